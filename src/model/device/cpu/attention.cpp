#include "model/device/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/aligned.h"
#include "flash_mla/decode.h"
#include "kernels/attention/dense_prefill/cpu/dense_prefill.h"
#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {

CpuAttention::KeyValueWeights::KeyValueWeights(const CpuContext& context, const std::vector<float>& kv_b)
    : KeyValueWeights(context, kv_b, split_kv_b(context.config, kv_b.data())) {}

CpuAttention::KeyValueWeights::KeyValueWeights(const CpuContext& context, const std::vector<float>& kv_b,
                                               const AbsorbedHalves<float>& halves)
    : both(context.gemm.pack(kv_b.data(),
                             static_cast<std::int64_t>(kv_b.size()) / context.config.kv_lora_rank,
                             context.config.kv_lora_rank, context.dtype)),
      uk(context, halves.uk.data(), context.config.num_attention_heads, context.config.kv_lora_rank,
         context.config.qk_nope_head_dim),
      uv(context, halves.uv.data(), context.config.num_attention_heads, context.config.v_head_dim,
         context.config.kv_lora_rank) {}

CpuAttention::CpuAttention(CpuContext& context, const AttentionWeights& weights)
    : context_(context),
      norm_(weights.norm),
      qkv_a_(context, weights.qkv_a, weights.qkv_a_bias),
      q_norm_(weights.q_norm),
      q_b_(weights.q_b.rows > 0 ? std::make_unique<CpuLinear>(context, weights.q_b) : nullptr),
      kv_norm_(weights.kv_norm),
      kv_b_(context, read_values(weights.kv_b)),
      o_(context, weights.o, weights.o_bias) {}

std::size_t CpuAttention::bytes_per_page() const {
  return static_cast<std::size_t>(kPageSize) *
         static_cast<std::size_t>(context_.config.kv_lora_rank + context_.config.qk_rope_head_dim) *
         dtype_size(context_.dtype);
}

void CpuAttention::allocate_cache(int num_pages) {
  cache_ = allocate_aligned(bytes_per_page() * static_cast<std::size_t>(num_pages));
}

void CpuAttention::copy_page(int source, int target) {
  const std::size_t bytes = bytes_per_page();
  std::memmove(cache_.data() + static_cast<std::size_t>(target) * bytes,
               cache_.data() + static_cast<std::size_t>(source) * bytes, bytes);
}

void CpuAttention::forward(Residual& x, Rows rows) {
  const ModelConfig& config = context_.config;
  const Matrix h = context_.activations(context_.buffers.h, x.x.rows, config.hidden_size);
  context_.rms_norm(x.x, norm_, config.rms_norm_eps, h);
  Projected projected = project(h);
  rope_and_append(projected);
  const bool has_prompt = context_.step->num_absorbed < context_.step->num_tokens();
  if (rows == Rows::kLogits && has_prompt) context_.narrow(x.x, projected.q);
  if (x.x.rows == 0) return;
  const Matrix attended = context_.activations(context_.buffers.attended, x.x.rows,
                                               std::int64_t{config.num_attention_heads} * config.v_head_dim);
  attend(projected.q, attended);
  o_.multiply_add(context_, attended, x.x);
}

// Queries, latents and keys of h, before rope.
CpuAttention::Projected CpuAttention::project(const Matrix& h) {
  const ModelConfig& config = context_.config;
  const std::int64_t heads = config.num_attention_heads, rope = config.qk_rope_head_dim;
  const std::int64_t q_width = heads * (config.qk_nope_head_dim + rope),
                     kv_width = config.kv_lora_rank + rope;
  const std::int64_t q_a_width = q_b_ ? config.q_lora_rank : q_width;

  const Matrix qkv_a = context_.activations(context_.buffers.qkv_a, h.rows, q_a_width + kv_width);
  qkv_a_.multiply(context_, h, qkv_a);
  const Matrix kv = qkv_a.column_range(q_a_width, kv_width);
  Matrix q = qkv_a.column_range(0, q_a_width);
  if (q_b_) {
    const Matrix q_a = context_.activations(context_.buffers.q_a, h.rows, q_a_width);
    context_.rms_norm(q, q_norm_, checkpoint::kLatentNormEps, q_a);
    q = context_.activations(context_.buffers.q, h.rows, q_width);
    q_b_->multiply(context_, q_a, q);
  }
  return {q, kv};
}

// Rotates the rope part of every head of q in place; normalises the latents, rotates the rope part of the
// keys and writes both to the tokens' slots of the cache.
void CpuAttention::rope_and_append(const Projected& projected) {
  const ModelConfig& config = context_.config;
  const Matrix &q = projected.q, &kv = projected.kv;
  const std::int64_t rank = config.kv_lora_rank, rope = config.qk_rope_head_dim, pairs = rope / 2;
  const std::int64_t nope = config.qk_nope_head_dim, element = context_.element();
  const DType dtype = context_.dtype;
  context_.for_rows(q.rows, q.columns + kv.columns, [&](std::int64_t t) {
    const float* cosines = context_.cosines.data() + t * pairs;
    const float* sines = context_.sines.data() + t * pairs;
    const std::int64_t slot = context_.step->slots[static_cast<std::size_t>(t)];
    std::byte* key = cache_.data() + slot * (rank + rope) * element;
    cpu::rows::rms_norm(kv.row(t), kv_norm_.data(), static_cast<float>(checkpoint::kLatentNormEps), key,
                        dtype, rank);
    std::memcpy(key + rank * element, kv.row(t) + rank * element, static_cast<std::size_t>(rope * element));
    cpu::rows::rotate(key + rank * element, cosines, sines, dtype, pairs);
    for (std::int64_t h = 0; h < config.num_attention_heads; ++h) {
      cpu::rows::rotate(q.row(t) + (h * (nope + rope) + nope) * element, cosines, sines, dtype, pairs);
    }
  });
}

// Attention of q, rotated, over the cache: the step's absorbed tokens, then its chunks.
void CpuAttention::attend(const Matrix& q, const Matrix& out) {
  const std::int64_t absorbed = context_.step->num_absorbed, expanded = q.rows - absorbed;
  if (absorbed > 0) absorbed_attention(q.row_range(0, absorbed), out.row_range(0, absorbed));
  if (expanded > 0) expanded_attention(q.row_range(absorbed, expanded), out.row_range(absorbed, expanded));
}

// q_latent[h] = [q_nope[h] · W_UK[h] | q_rope[h]]; out_latent = softmax(scale * q_latent · cache^T) · cache;
// out[h] = out_latent[h] · W_UV[h]^T.
void CpuAttention::absorbed_attention(const Matrix& q, const Matrix& out) {
  const ModelConfig& config = context_.config;
  const std::int64_t heads = config.num_attention_heads, element = context_.element();
  const std::int64_t nope = config.qk_nope_head_dim, rope = config.qk_rope_head_dim;
  const std::int64_t rank = config.kv_lora_rank;
  const Matrix q_latent = context_.activations(context_.buffers.q_latent, q.rows, heads * (rank + rope));
  const Matrix out_latent = context_.activations(context_.buffers.out_latent, q.rows, heads * rank);
  kv_b_.uk.multiply(context_, q, nope + rope, q_latent, rank + rope, [&](std::int64_t h) {
    for (std::int64_t t = 0; t < q.rows; ++t) {
      std::memcpy(q_latent.row(t) + (h * (rank + rope) + rank) * element,
                  q.row(t) + (h * (nope + rope) + nope) * element, static_cast<std::size_t>(rope * element));
    }
  });
  decode(q_latent, out_latent);
  kv_b_.uv.multiply(context_, out_latent, rank, out, config.v_head_dim, [](std::int64_t) {});
}

void CpuAttention::decode(const Matrix& q_latent, const Matrix& out_latent) {
  const ModelConfig& config = context_.config;
  const Step& step = *context_.step;
  const DType dtype = context_.dtype;
  const std::int64_t n = step.num_absorbed, heads = config.num_attention_heads;
  const std::int64_t rank = config.kv_lora_rank, width = rank + config.qk_rope_head_dim;
  const auto pages = static_cast<std::int64_t>(cache_.bytes() / bytes_per_page());
  DenseDecodeArgs args;
  args.q = TensorView::contiguous(q_latent.data, dtype, {n, 1, heads, width});
  args.k_cache = TensorView::contiguous(cache_.data(), dtype, {pages, kPageSize, 1, width});
  args.block_table = TensorView::contiguous(const_cast<std::int32_t*>(step.absorbed_table.data()),
                                            DType::kInt32, {n, step.max_blocks});
  args.cache_seqlens =
      TensorView::contiguous(const_cast<std::int32_t*>(step.absorbed_lens.data()), DType::kInt32, {n});
  args.out = TensorView::contiguous(out_latent.data, dtype, {n, 1, heads, rank});
  DenseDecodeOptions options;
  options.softmax_scale = static_cast<float>(config.softmax_scale());
  options.num_threads = context_.threads;
  const DecodeScheduleView schedule = context_.schedule.view();
  const std::size_t bytes = dense_decode_workspace_size(args, schedule, options);
  Buffer& workspace = context_.buffers.decode_workspace;
  if (bytes > workspace.bytes()) workspace = allocate_aligned(bytes);
  dense_decode(args, schedule, workspace.data(), bytes, options);
}

// Causal attention of the step's chunks with keys and values expanded from the cached latents.
void CpuAttention::expanded_attention(const Matrix& q, const Matrix& out) {
  const ModelConfig& config = context_.config;
  const Step& step = *context_.step;
  // Many chunks: one for each thread at a time. Few: each is shared.
  const auto chunks = std::ssize(step.chunks);
  const bool whole = chunks / 2 >= context_.threads;
  parallel_for(chunks, whole ? context_.threads : 1, [&](std::int64_t i) {
    const Chunk& chunk = step.chunks[static_cast<std::size_t>(i)];
    const std::int64_t first = chunk.first_token - step.num_absorbed;
    cpu::DensePrefill args;
    args.heads = config.num_attention_heads;
    args.nope = config.qk_nope_head_dim;
    args.rope = config.qk_rope_head_dim;
    args.v = config.v_head_dim;
    args.rank = config.kv_lora_rank;
    args.scale = static_cast<float>(config.softmax_scale());
    args.q = q.row_range(first, chunk.num_tokens);
    args.out = out.row_range(first, chunk.num_tokens);
    args.cache = cache_.data();
    args.pages = chunk.pages;
    args.seq_len = chunk.seq_len;
    args.kv_b = &kv_b_.both;
    args.num_threads = whole ? 1 : context_.threads;
    args.batch_invariant = step.batch_invariant;
    cpu::dense_prefill(context_.gemm, args);
  });
}

}  // namespace flash_mla::model
