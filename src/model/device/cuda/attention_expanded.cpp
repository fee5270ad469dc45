// The un-absorbed form of attention: a step's chunks, with keys and values expanded from the cached latents.

#include "base/cuda/check.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"
#include "kernels/attention/plain/sm90/plain_attention.h"
#include "kernels/rows/sm90/rows.h"
#include "model/device/cuda/attention.h"

namespace flash_mla::model {
namespace {

constexpr DType kType = DType::kBFloat16;

}  // namespace

// Rotates the rope part of every head of q in place; normalises the latents, rotates the rope part of the
// keys and writes both to the tokens' slots of the cache. The rows are the step's tokens from `first_token`
// on.
void CudaAttention::rope_and_append(const Projected& projected, std::int64_t first_token) {
  const ModelConfig& config = context_.config;
  sm90::RopeAndAppend args;
  args.q = projected.q;
  args.kv = projected.kv;
  args.kv_norm = floats(kv_norm_);
  args.eps = static_cast<float>(checkpoint::kLatentNormEps);
  args.slots = cache_.rows() != nullptr ? context_.data.slots + first_token : nullptr;
  args.rotations = context_.rotations;
  args.rotations.cosines += first_token * context_.rotations.pairs;
  args.rotations.sines += first_token * context_.rotations.pairs;
  const Matrix keys = key_rows(projected.kv.rows);
  args.cache = keys.data;
  args.heads = config.num_attention_heads;
  args.nope = config.qk_nope_head_dim;
  args.rope = config.qk_rope_head_dim;
  args.rank = config.kv_lora_rank;
  sm90::rope_and_append(args, context_.stream);
  if (cache_.rows() == nullptr) cache_.append(keys, first_token);
}

void CudaAttention::expanded_attention(const Matrix& q, const Matrix& out) {
  const bool native = has_sm90_prefill(context_.config);
  for (const StepData::Group& group : context_.data.groups) {
    gather_and_expand(group);
    const Matrix group_q = q.row_range(group.first_query, group.num_queries);
    const Matrix group_out = out.row_range(group.first_query, group.num_queries);
    if (native) {
      attend_sm90(group, group_q, group_out);
    } else {
      attend_plain(group, group_q, group_out);
    }
  }
}

// Keys and values of every head for the group's cached tokens.
void CudaAttention::gather_and_expand(const StepData::Group& group) {
  const ModelConfig& config = context_.config;
  context_.grow_expanded(group.num_keys);
  auto& buffers = context_.buffers;
  sm90::GatherKeys keys;
  keys.cache = cache_.rows();
  keys.starts = group.key_starts;
  keys.tables = group.tables;
  keys.pages = group.pages;
  keys.num_seqs = group.num_seqs;
  keys.num_keys = group.num_keys;
  keys.rank = config.kv_lora_rank;
  keys.rope = config.qk_rope_head_dim;
  keys.latents = buffers.latents.data();
  keys.k_rope = buffers.k_rope.data();
  sm90::gather_keys(keys, context_.stream);
  const std::int64_t width =
      std::int64_t{config.num_attention_heads} * (config.qk_nope_head_dim + config.v_head_dim);
  kv_b_.both.multiply(context_, context_.activations(buffers.latents, group.num_keys, config.kv_lora_rank),
                      context_.activations(buffers.expanded, group.num_keys, width));
}

void CudaAttention::attend_sm90(const StepData::Group& group, const Matrix& q, const Matrix& out) {
  const ModelConfig& config = context_.config;
  auto& buffers = context_.buffers;
  const std::int64_t heads = config.num_attention_heads, nope = config.qk_nope_head_dim;
  const std::int64_t rope = config.qk_rope_head_dim, v = config.v_head_dim;
  sm90::DensePrefillArgs args;
  args.q = on_device(q.data, kType, {q.rows, heads, nope + rope});
  args.q.strides[0] = q.stride;
  args.k_nope = on_device(buffers.expanded.data(), kType, {group.num_keys, heads, nope});
  args.k_nope.strides = {heads * (nope + v), nope + v, 1};
  args.v = on_device(buffers.expanded.data() + static_cast<std::size_t>(nope) * dtype_size(kType), kType,
                     {group.num_keys, heads, v});
  args.v.strides = args.k_nope.strides;
  args.k_rope = on_device(buffers.k_rope.data(), kType, {group.num_keys, rope});
  args.cu_seqlens_q = on_device(group.query_starts, DType::kInt32, {group.num_seqs + 1});
  args.cu_seqlens_k = on_device(group.key_starts, DType::kInt32, {group.num_seqs + 1});
  args.out = on_device(out.data, kType, {out.rows, heads, v});
  context_.grow(buffers.prefill_workspace, sm90::dense_prefill_workspace_size());
  sm90::dense_prefill(args, static_cast<float>(config.softmax_scale()), /*causal=*/true,
                      buffers.prefill_workspace.data(), context_.stream);
}

void CudaAttention::attend_plain(const StepData::Group& group, const Matrix& q, const Matrix& out) {
  const ModelConfig& config = context_.config;
  sm90::PlainPrefill args;
  args.q = q;
  args.out = out;
  args.expanded = context_.buffers.expanded.data();
  args.k_rope = context_.buffers.k_rope.data();
  args.query_starts = group.query_starts;
  args.key_starts = group.key_starts;
  args.num_seqs = group.num_seqs;
  args.heads = config.num_attention_heads;
  args.nope = config.qk_nope_head_dim;
  args.rope = config.qk_rope_head_dim;
  args.v = config.v_head_dim;
  args.scale = static_cast<float>(config.softmax_scale());
  sm90::plain_prefill(args, context_.stream);
}

}  // namespace flash_mla::model
