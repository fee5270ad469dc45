#include "model/device/cuda/latent_cache.h"

#include <string>

#include "base/cuda/check.h"
#include "base/page_size.h"
#include "flash_mla/sparse.h"
#include "kv/format.h"

namespace flash_mla::model {
namespace {

constexpr DType kType = DType::kBFloat16;

// What sparse decode takes: it divides a token's list among multiprocessors, which pays while there are few tokens.
constexpr std::int64_t kMostDecodeTokens = 256, kMostDecodeHeads = 128;

}  // namespace

std::size_t CudaLatentCache::bytes_per_page() const {
  const KvFormat format = context_.fp8_cache ? KvFormat::kFp8V32 : KvFormat::kBFloat16;
  return kPageSize * static_cast<std::size_t>(kv::token_bytes(format, static_cast<int>(width())));
}

std::string CudaLatentCache::format() const {
  return std::to_string(width()) + (context_.fp8_cache ? " in fp8_v32" : " x bfloat16");
}

bool CudaLatentCache::has_plain_rows() const { return !context_.fp8_cache && width() == 576; }

void CudaLatentCache::allocate(int num_pages) {
  data_ = context_.pool->allocate(bytes_per_page() * static_cast<std::size_t>(num_pages));
}

void CudaLatentCache::clear() {
  check(cudaMemsetAsync(data_.data(), 0, data_.bytes(), context_.stream), "cudaMemsetAsync");
}

void CudaLatentCache::copy_page(int source, int target) {
  const std::size_t bytes = bytes_per_page();
  check(cudaMemcpyAsync(data_.data() + static_cast<std::size_t>(target) * bytes,
                        data_.data() + static_cast<std::size_t>(source) * bytes, bytes,
                        cudaMemcpyDeviceToDevice, context_.stream),
        "cudaMemcpyAsync");
}

KvCacheView CudaLatentCache::view() const {
  KvCacheView out;
  out.format = context_.fp8_cache ? KvFormat::kFp8V32 : KvFormat::kBFloat16;
  const DType element = context_.fp8_cache ? DType::kUInt8 : kType;
  const std::int64_t bytes = kv::token_bytes(out.format, static_cast<int>(width()));
  out.data = on_device(data_.data(), element,
                       {num_pages(), kPageSize, 1, bytes / static_cast<std::int64_t>(dtype_size(element))});
  return out;
}

void CudaLatentCache::append(const Matrix& keys, std::int64_t first_token) const {
  const std::int64_t rank = context_.config.kv_lora_rank, rope = context_.config.qk_rope_head_dim;
  const auto columns = [&](std::int64_t first, std::int64_t count) {
    TensorView out = on_device(keys.column_range(first, count).data, keys.dtype, {keys.rows, count});
    out.strides[0] = keys.stride;
    return out;
  };
  KvAppendArgs args;
  args.latent = columns(0, rank);
  args.rope = columns(rank, rope);
  args.slot_mapping = on_device(context_.data.slots + first_token, DType::kInt64, {keys.rows});
  args.cache = view();
  // As on the CPU: a latent read back is the same number in bfloat16 and in float32.
  args.recipe = Fp8Recipe::kFlashMla;
  KvCacheOptions options;
  options.stream = context_.stream;
  append_kv(args, options);
}

void CudaLatentCache::attend_listed(const Matrix& q, const Matrix& out, std::int64_t first_token) const {
  const std::int64_t n = q.rows, topk = context_.index_topk();
  const TensorView lengths = on_device(context_.data.attended_lens + first_token, DType::kInt32, {n});
  const auto* selection = reinterpret_cast<const std::int32_t*>(context_.buffers.selection.data());
  const TensorView lists = on_device(selection + first_token * topk, DType::kInt32, {n, topk});
  // Where nothing may depend on other tokens, a list is not divided by how many there are.
  if (!context_.step->batch_invariant && n <= kMostDecodeTokens &&
      context_.config.num_attention_heads <= kMostDecodeHeads) {
    decode_listed(q, out, lengths, lists);
  } else {
    prefill_listed(q, out, lengths, lists);
  }
}

void CudaLatentCache::decode_listed(const Matrix& q, const Matrix& out, const TensorView& lengths,
                                    TensorView lists) const {
  const std::int64_t n = q.rows, heads = context_.config.num_attention_heads;
  lists = on_device(lists.data, DType::kInt32, {n, 1, lists.size(1)});
  SparseDecodeArgs args;
  args.q = on_device(q.data, kType, {n, 1, heads, width()});
  args.keys = {view(), lists, lengths};
  args.out = on_device(out.data, kType, {n, 1, heads, context_.config.kv_lora_rank});
  SparseDecodeOptions options;
  options.softmax_scale = static_cast<float>(context_.config.softmax_scale());
  options.stream = context_.stream;
  const std::size_t bytes = sparse_decode_workspace_size(args, options);
  context_.grow(context_.buffers.decode_workspace, bytes);
  sparse_decode(args, context_.buffers.decode_workspace.data(), bytes, options);
}

void CudaLatentCache::prefill_listed(const Matrix& q, const Matrix& out, const TensorView& lengths,
                                     const TensorView& lists) const {
  const std::int64_t n = q.rows, heads = context_.config.num_attention_heads;
  SparsePrefillArgs args;
  args.q = on_device(q.data, kType, {n, heads, width()});
  args.cache = view();
  args.indices = lists;
  args.topk_length = lengths;
  args.out = on_device(out.data, kType, {n, heads, context_.config.kv_lora_rank});
  SparsePrefillOptions options;
  options.softmax_scale = static_cast<float>(context_.config.softmax_scale());
  options.stream = context_.stream;
  // On a GPU it needs no workspace.
  sparse_prefill(args, nullptr, 0, options);
}

}  // namespace flash_mla::model
