#include "model/deepseek.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <utility>

#include "flash_mla/error.h"
#include "model/step.h"

namespace flash_mla::model {
DeepSeek::DeepSeek(ModelConfig config, Weights weights, std::unique_ptr<Ops> ops)
    : config_(std::move(config)),
      ops_(std::move(ops)),
      weights_(std::move(weights)),
      expert_ids_(weights_.layers.size()),
      experts_per_token_(config_.num_experts_per_tok +
                         (ops_->folds_shared_experts() ? config_.n_shared_experts : 0)) {}

void DeepSeek::launch(const ForwardBatch& batch) {
  if (!flights_.empty() && flights_.back().num_logit_rows > 0) {
    throw std::logic_error("launch: a step with logit_rows has not been collected");
  }
  step_ =
      plan_step(batch, {config_.vocab_size, config_.max_position_embeddings, num_pages_, num_tokens_chosen_});
  num_tokens_chosen_ = 0;
  Flight flight;
  flight.num_logit_rows = batch.logit_rows.size();
  flight.num_tokens = batch.drawn_rows.size() + batch.greedy_rows.size();
  if (step_.num_tokens() > 0) {
    begin(step_);
    ops_->run([&] { layers(step_); });
  }
  if (flight.num_tokens > 0) {
    constexpr std::size_t kId = sizeof(std::int32_t);
    flight.tokens =
        ops_->start_download(tokens_.data() + flight.num_logit_rows * kId, flight.num_tokens * kId);
    if (flight.num_logit_rows == 0) num_tokens_chosen_ = static_cast<std::int64_t>(flight.num_tokens);
  }
  flights_.push_back(std::move(flight));
}

void DeepSeek::collect(float* logits, std::int32_t* tokens) {
  if (flights_.empty()) throw std::logic_error("collect: no step has been launched");
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  if (flight.num_logit_rows > 0) {
    const std::size_t row = static_cast<std::size_t>(config_.vocab_size) * sizeof(float);
    ops_->download(logits_.data(), flight.num_logit_rows * row, logits);
  }
  if (flight.tokens) std::memcpy(tokens, flight.tokens->wait(), flight.num_tokens * sizeof(std::int32_t));
}

void DeepSeek::layers(Step& step) {
  Matrix x = activations(x_, step.num_tokens(), config_.hidden_size);
  ops_->embed(weights_.embedding, tokens_, x);
  for (std::size_t i = 0; i < expert_ids_.size(); ++i) {
    if (config_.is_moe_layer(static_cast<int>(i))) {
      activations(expert_ids_[i], step.num_tokens() * experts_per_token_, 1, DType::kInt32);
    }
  }
  Step rest;
  if (!ops_->run_layers(weights_, caches_, expert_ids_, x)) x = layer_by_layer(step, x, rest);

  const auto rows = static_cast<std::int64_t>(step.logit_rows.size());
  if (rows == 0) return;
  const Matrix last = activations(last_, rows, config_.hidden_size);
  ops_->gather_logit_rows(x, last);
  ops_->rms_norm(last, weights_.norm, config_.rms_norm_eps, last);
  const Matrix out = activations(logits_, rows, config_.vocab_size, DType::kFloat32);
  ops_->linear(last, *weights_.lm_head, out);
  activations(tokens_, rows, 1, DType::kInt32);
  if (step.first_chosen < rows) ops_->choose(out, tokens_);
}

// What the last layer leaves of x, of the rows whose logits are wanted alone where the step narrows to them:
// `rest` is then the device's step.
Matrix DeepSeek::layer_by_layer(const Step& step, Matrix x, Step& rest) {
  // Nothing reads what the last layer makes of a prompt's tokens but the last.
  const bool narrows = ops_->narrows() && step.num_absorbed < step.num_tokens();

  Matrix h = activations(h_, step.num_tokens(), config_.hidden_size);
  ops_->rms_norm(x, weights_.layers[0].input_norm, config_.rms_norm_eps, h);
  for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
    const Layer& layer = weights_.layers[i];
    const Buffer* next_norm = i + 1 < weights_.layers.size() ? &weights_.layers[i + 1].input_norm : nullptr;
    Projected projected = project(layer.attention, h);
    if (narrows && next_norm == nullptr) {
      ops_->rope_and_append(projected.q, projected.kv, 0, layer.attention.kv_norm, checkpoint::kLatentNormEps,
                            caches_[i]);
      const auto wanted = static_cast<std::int64_t>(step.logit_rows.size());
      if (wanted == 0) return x;
      const Matrix all_x = x;
      x = activations(last_x_, wanted, x.columns);
      const Matrix q = activations(last_q_, wanted, projected.q.columns);
      h = activations(h_, wanted, h.columns);
      ops_->gather_logit_rows(all_x, x);
      ops_->gather_logit_rows(projected.q, q);
      rest = logit_step(step);
      begin(rest);
      attend(layer.attention, caches_[i], q, nullptr, x);
    } else {
      attend(layer.attention, caches_[i], projected.q, &projected.kv, x);
    }
    if (config_.is_moe_layer(static_cast<int>(i))) {
      mixture(layer, expert_ids_[i], h, x, next_norm);
    } else {
      ops_->rms_norm(x, layer.post_attention_norm, config_.rms_norm_eps, h);
      feed_forward(layer.dense, h, x);
      if (next_norm != nullptr) ops_->rms_norm(x, *next_norm, config_.rms_norm_eps, h);
    }
  }
  return x;
}

void DeepSeek::begin(Step& step) {
  ops_->begin_step(step);
  num_absorbed_ = step.num_absorbed;
}

// Queries, latents and keys of h, before rope.
DeepSeek::Projected DeepSeek::project(const Attention& weights, Matrix h) {
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
    ops_->rms_norm(q, weights.q_norm, checkpoint::kLatentNormEps, q_a);
    q = activations(q_, tokens, q_width);
    ops_->linear(q_a, *weights.q_b, q);
  }
  return {q, kv};
}

// x += attention of q, whose latents and keys `kv` are appended first; null: q is rotated and they are in the
// cache. Tokens of sequences with few new ones take the absorbed form over the cached latents, the others
// expand keys and values from them.
void DeepSeek::attend(const Attention& weights, const Buffer& cache, Matrix q, const Matrix* kv, Matrix x) {
  const std::int64_t tokens = q.rows, heads = config_.num_attention_heads;
  const std::int64_t rope = config_.qk_rope_head_dim, rank = config_.kv_lora_rank;
  const Matrix attended = activations(attended_, tokens, heads * config_.v_head_dim);
  const std::int64_t absorbed = num_absorbed_, expanded = tokens - absorbed;
  if (absorbed > 0) {
    const Matrix absorbed_q = q.row_range(0, absorbed);
    const Matrix q_latent = activations(q_latent_, absorbed, heads * (rank + rope));
    const Matrix out_latent = activations(out_latent_, absorbed, heads * rank);
    if (kv != nullptr) {
      ops_->append_and_absorb(absorbed_q, kv->row_range(0, absorbed), weights.kv_norm,
                              checkpoint::kLatentNormEps, cache, *weights.w_uk, q_latent);
    } else {
      ops_->absorb_queries(absorbed_q, *weights.w_uk, q_latent);
    }
    ops_->decode_attention(q_latent, cache, out_latent);
    ops_->expand_values(out_latent, *weights.w_uv, attended.row_range(0, absorbed));
  }
  if (expanded > 0) {
    const Matrix chunk_q = q.row_range(absorbed, expanded);
    if (kv != nullptr) {
      ops_->rope_and_append(chunk_q, kv->row_range(absorbed, expanded), absorbed, weights.kv_norm,
                            checkpoint::kLatentNormEps, cache);
    }
    ops_->prefill_attention(chunk_q, cache, *weights.kv_b, attended.row_range(absorbed, expanded));
  }
  ops_->linear_add(attended, *weights.o, x);
}

// x += down(silu(gate(h)) * up(h))
void DeepSeek::feed_forward(const FeedForward& weights, Matrix h, Matrix x) {
  const Matrix act = activations(act_, h.rows, weights.intermediate);
  ops_->linear_silu_mul(h, *weights.gate_up, act);
  ops_->linear_add(act, *weights.down, x);
}

// With h = norm(x): x += the chosen experts of h, weighted, and the shared ones. Then h = next_norm(x), if
// there is one.
void DeepSeek::mixture(const Layer& layer, const Buffer& ids, Matrix h, Matrix x, const Buffer* next_norm) {
  const MixtureOfExperts& weights = layer.moe;
  const double eps = config_.rms_norm_eps;
  const std::int64_t chosen = h.rows * experts_per_token_;
  activations(expert_weights_, chosen, 1, DType::kFloat32);
  ops_->norm_and_route(x, layer.post_attention_norm, eps, h, *weights.router, weights.correction_bias, ids,
                       expert_weights_);
  if (weights.shared.intermediate > 0) feed_forward(weights.shared, h, x);
  if (next_norm != nullptr) {
    ops_->experts_add_and_norm(h, *weights.experts, ids, expert_weights_, x, *next_norm, eps);
  } else {
    ops_->experts_add(h, *weights.experts, ids, expert_weights_, x);
  }
}

void DeepSeek::reserve(int most_tokens, int most_rows) {
  const std::int64_t num_tokens = ops_->padded(most_tokens), num_rows = ops_->padded(most_rows);
  const std::int64_t heads = config_.num_attention_heads, latent = config_.kv_lora_rank;
  const std::int64_t nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
  const std::int64_t q_width = heads * (nope + rope), chosen = experts_per_token_;
  const std::int64_t intermediate =
      std::max(config_.intermediate_size, config_.n_shared_experts * config_.moe_intermediate_size);
  activations(x_, num_tokens, config_.hidden_size);
  activations(h_, num_tokens, config_.hidden_size);
  activations(qkv_a_, num_tokens, (config_.q_lora_rank > 0 ? config_.q_lora_rank : q_width) + latent + rope);
  activations(q_a_, num_tokens, config_.q_lora_rank);
  activations(q_, num_tokens, config_.q_lora_rank > 0 ? q_width : 0);
  activations(q_latent_, num_tokens, heads * (latent + rope));
  activations(out_latent_, num_tokens, heads * latent);
  activations(attended_, num_tokens, heads * config_.v_head_dim);
  activations(act_, num_tokens, intermediate);
  for (std::size_t i = 0; i < expert_ids_.size(); ++i) {
    if (config_.is_moe_layer(static_cast<int>(i))) {
      activations(expert_ids_[i], num_tokens * chosen, 1, DType::kInt32);
    }
  }
  activations(expert_weights_, num_tokens * chosen, 1, DType::kFloat32);
  activations(last_, num_rows, config_.hidden_size);
  activations(logits_, num_rows, config_.vocab_size, DType::kFloat32);
  activations(tokens_, num_rows, 1, DType::kInt32);
  ops_->reserve(num_tokens);
}

std::int64_t DeepSeek::experts_hit(int num_tokens) {
  std::int64_t hit = 0;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(num_tokens * experts_per_token_));
  for (const Buffer& layer : expert_ids_) {
    if (layer.bytes() < ids.size() * sizeof(std::int32_t) || ids.empty()) continue;
    ops_->download(layer.data(), ids.size() * sizeof(std::int32_t), ids.data());
    std::set<std::int32_t> routed;
    for (const std::int32_t id : ids) {
      if (id < config_.n_routed_experts) routed.insert(id);
    }
    hit += std::ssize(routed);
  }
  return hit;
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
