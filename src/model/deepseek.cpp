#include "model/deepseek.h"

#include <fmt/format.h>

#include <utility>

#include "flash_mla/error.h"
#include "model/step.h"

namespace flash_mla::model {
namespace {

// DeepSeek's norms inside the attention have this epsilon, whatever rms_norm_eps says.
constexpr double kLatentNormEps = 1e-6;

}  // namespace

DeepSeek::DeepSeek(ModelConfig config, const Checkpoint& checkpoint, std::unique_ptr<Ops> ops)
    : config_(std::move(config)), ops_(std::move(ops)), weights_(load_weights(config_, checkpoint, *ops_)) {}

void DeepSeek::forward(const ForwardBatch& batch, float* logits) {
  Step step = plan_step(batch, {config_.vocab_size, config_.max_position_embeddings, num_pages_});
  if (step.num_tokens() == 0) return;
  begin(step);
  // Nothing reads what the last layer makes of a prompt's tokens but the last.
  const bool narrows = ops_->narrows() && step.num_absorbed < step.num_tokens();
  Step rest;

  Matrix x = activations(x_, step.num_tokens(), config_.hidden_size);
  Matrix h = activations(h_, step.num_tokens(), config_.hidden_size);
  ops_->embed(weights_.embedding, x);
  for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
    const Layer& layer = weights_.layers[i];
    ops_->rms_norm(x, layer.input_norm, config_.rms_norm_eps, h);
    Matrix q = append(layer.attention, caches_[i], h);
    if (narrows && i + 1 == weights_.layers.size()) {
      const auto wanted = static_cast<std::int64_t>(step.logit_rows.size());
      if (wanted == 0) return;
      const Matrix all_x = x, all_q = q;
      x = activations(last_x_, wanted, x.columns);
      q = activations(last_q_, wanted, q.columns);
      h = activations(h_, wanted, h.columns);
      ops_->gather_logit_rows(all_x, x);
      ops_->gather_logit_rows(all_q, q);
      rest = logit_step(step);
      begin(rest);
    }
    attend(layer.attention, caches_[i], q, x);
    ops_->rms_norm(x, layer.post_attention_norm, config_.rms_norm_eps, h);
    if (config_.is_moe_layer(static_cast<int>(i))) {
      mixture(layer.moe, h, x);
    } else {
      feed_forward(layer.dense, h, x);
    }
  }

  const auto rows = static_cast<std::int64_t>(step.logit_rows.size());
  if (rows == 0) return;
  const Matrix last = activations(last_, rows, config_.hidden_size);
  ops_->gather_logit_rows(x, last);
  ops_->rms_norm(last, weights_.norm, config_.rms_norm_eps, last);
  const Matrix out = activations(logits_, rows, config_.vocab_size, DType::kFloat32);
  ops_->linear(last, *weights_.lm_head, out);
  ops_->download(out, logits);
}

void DeepSeek::begin(const Step& step) {
  ops_->begin_step(step);
  num_absorbed_ = step.num_absorbed;
}

// The queries of h; its latents go to the cache.
Matrix DeepSeek::append(const Attention& weights, const Buffer& cache, Matrix h) {
  const std::int64_t tokens = h.rows, heads = config_.num_attention_heads;
  const std::int64_t rope = config_.qk_rope_head_dim, rank = config_.kv_lora_rank;
  const std::int64_t q_width = heads * (config_.qk_nope_head_dim + rope);
  const std::int64_t q_a_width = config_.q_lora_rank > 0 ? config_.q_lora_rank : q_width;

  const Matrix qkv_a = activations(qkv_a_, tokens, q_a_width + rank + rope);
  ops_->linear(h, *weights.qkv_a, qkv_a);
  const Matrix kv = qkv_a.column_range(q_a_width, rank + rope);
  Matrix q = qkv_a.column_range(0, q_a_width);
  if (config_.q_lora_rank > 0) {
    const Matrix q_a = activations(q_a_, tokens, q_a_width);
    ops_->rms_norm(q, weights.q_norm, kLatentNormEps, q_a);
    q = activations(q_, tokens, q_width);
    ops_->linear(q_a, *weights.q_b, q);
  }
  ops_->rope_and_append(q, kv, weights.kv_norm, kLatentNormEps, cache);
  return q;
}

// x += attention of q. Tokens of sequences with few new ones take the absorbed form over the cached latents,
// the others expand keys and values from them.
void DeepSeek::attend(const Attention& weights, const Buffer& cache, Matrix q, Matrix x) {
  const std::int64_t tokens = q.rows, heads = config_.num_attention_heads;
  const std::int64_t rope = config_.qk_rope_head_dim, rank = config_.kv_lora_rank;
  const Matrix attended = activations(attended_, tokens, heads * config_.v_head_dim);
  const std::int64_t absorbed = num_absorbed_;
  if (absorbed > 0) {
    const Matrix q_latent = activations(q_latent_, absorbed, heads * (rank + rope));
    const Matrix out_latent = activations(out_latent_, absorbed, heads * rank);
    ops_->absorb_queries(q.row_range(0, absorbed), *weights.w_uk, q_latent);
    ops_->decode_attention(q_latent, cache, out_latent);
    ops_->expand_values(out_latent, *weights.w_uv, attended.row_range(0, absorbed));
  }
  if (absorbed < tokens) {
    ops_->prefill_attention(q.row_range(absorbed, tokens - absorbed), cache, *weights.kv_b,
                            attended.row_range(absorbed, tokens - absorbed));
  }
  ops_->linear_add(attended, *weights.o, x);
}

// x += down(silu(gate(h)) * up(h))
void DeepSeek::feed_forward(const FeedForward& weights, Matrix h, Matrix x) {
  const Matrix gate_up = activations(gate_up_, h.rows, 2 * weights.intermediate);
  const Matrix act = activations(act_, h.rows, weights.intermediate);
  ops_->linear(h, *weights.gate_up, gate_up);
  ops_->silu_mul(gate_up, act);
  ops_->linear_add(act, *weights.down, x);
}

// x += the chosen experts of h, weighted, and the shared ones
void DeepSeek::mixture(const MixtureOfExperts& weights, Matrix h, Matrix x) {
  const std::int64_t chosen = h.rows * config_.num_experts_per_tok;
  activations(ids_, chosen, 1, DType::kInt32);
  activations(expert_weights_, chosen, 1, DType::kFloat32);
  ops_->route(h, *weights.router, weights.correction_bias, ids_, expert_weights_);
  ops_->experts_add(h, *weights.experts, ids_, expert_weights_, x);
  if (weights.shared.intermediate > 0) feed_forward(weights.shared, h, x);
}

std::size_t DeepSeek::layer_page_bytes() const {
  return static_cast<std::size_t>(kPageSize) *
         static_cast<std::size_t>(config_.kv_lora_rank + config_.qk_rope_head_dim) *
         dtype_size(ops_->dtype());
}

std::size_t DeepSeek::bytes_per_page() const {
  return layer_page_bytes() * static_cast<std::size_t>(config_.num_hidden_layers);
}

void DeepSeek::allocate_cache(int num_pages) {
  if (num_pages < 0) throw InvalidArgument(fmt::format("num_pages is {}, expected >= 0", num_pages));
  caches_.clear();
  num_pages_ = 0;
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    caches_.push_back(ops_->allocate(layer_page_bytes() * static_cast<std::size_t>(num_pages)));
  }
  num_pages_ = num_pages;
}

void DeepSeek::copy_page(int source, int target) {
  for (const auto& [name, page] : {std::pair("source", source), std::pair("target", target)}) {
    if (page < 0 || page >= num_pages_) {
      throw InvalidArgument(
          fmt::format("{} is {}, expected 0 to {}, the pages of the cache", name, page, num_pages_ - 1));
    }
  }
  const std::size_t bytes = layer_page_bytes();
  for (const Buffer& cache : caches_) {
    ops_->copy(cache, static_cast<std::size_t>(source) * bytes, static_cast<std::size_t>(target) * bytes,
               bytes);
  }
}

Matrix DeepSeek::activations(Buffer& buffer, std::int64_t rows, std::int64_t columns) {
  return activations(buffer, rows, columns, ops_->dtype());
}

Matrix DeepSeek::activations(Buffer& buffer, std::int64_t rows, std::int64_t columns, DType dtype) {
  const std::size_t bytes = static_cast<std::size_t>(rows * columns) * dtype_size(dtype);
  if (bytes > buffer.bytes()) buffer = ops_->allocate(bytes);
  return {buffer.data(), dtype, rows, columns, columns};
}

}  // namespace flash_mla::model
