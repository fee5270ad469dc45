#include "model/device/cpu/latent_cache.h"

#include <fmt/format.h>

#include <cstring>

#include "base/aligned.h"
#include "flash_mla/decode.h"
#include "flash_mla/dense_fp8.h"

namespace flash_mla::model {
namespace {

TensorView int32s(const std::int32_t* data, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(const_cast<std::int32_t*>(data), DType::kInt32, shape);
}

/// The type of a cache's elements.
DType element_of(KvFormat format) {
  switch (format) {
    case KvFormat::kBFloat16:
      return DType::kBFloat16;
    case KvFormat::kFloat16:
      return DType::kFloat16;
    default:
      return DType::kUInt8;
  }
}

/// Makes the workspace large enough; it grows and stays.
void grow(Buffer& workspace, std::size_t bytes) {
  if (bytes > workspace.bytes()) workspace = allocate_aligned(bytes);
}

}  // namespace

std::size_t CpuLatentCache::bytes_per_page() const {
  const auto elements = static_cast<std::size_t>(width());
  return kPageSize *
         (context_.cache_format
              ? static_cast<std::size_t>(kv::token_bytes(*context_.cache_format, static_cast<int>(width())))
              : elements * dtype_size(context_.dtype));
}

std::string CpuLatentCache::format() const {
  if (!context_.cache_format) return fmt::format("{} x {}", width(), dtype_name(context_.dtype));
  return fmt::format("{} bytes of format {}, of {}",
                     kv::token_bytes(*context_.cache_format, static_cast<int>(width())),
                     static_cast<int>(*context_.cache_format), dtype_name(context_.dtype));
}

bool CpuLatentCache::has_plain_rows() const {
  const bool bf16 = context_.cache_format ? *context_.cache_format == KvFormat::kBFloat16
                                          : context_.dtype == DType::kBFloat16;
  return bf16 && width() == 576;
}

void CpuLatentCache::allocate(int num_pages) {
  data_ = allocate_aligned(bytes_per_page() * static_cast<std::size_t>(num_pages));
}

void CpuLatentCache::copy_page(int source, int target) {
  const std::size_t bytes = bytes_per_page();
  std::memmove(data_.data() + static_cast<std::size_t>(target) * bytes,
               data_.data() + static_cast<std::size_t>(source) * bytes, bytes);
}

KvCacheView CpuLatentCache::view(std::int64_t page_size) const {
  const KvFormat format = *context_.cache_format;
  const DType element = element_of(format);
  const std::int64_t bytes = kv::token_bytes(format, static_cast<int>(width()));
  KvCacheView out;
  out.format = format;
  out.data = TensorView::contiguous(
      data_.data(), element,
      {num_tokens() / page_size, page_size, 1, bytes / static_cast<std::int64_t>(dtype_size(element))});
  return out;
}

void CpuLatentCache::append(const Matrix& x) {
  const std::int64_t rank = context_.config.kv_lora_rank, rope = context_.config.qk_rope_head_dim;
  const auto columns = [&](std::int64_t first, std::int64_t count) {
    TensorView out = TensorView::contiguous(x.column_range(first, count).data, x.dtype, {x.rows, count});
    out.strides[0] = x.stride;
    return out;
  };
  KvAppendArgs args;
  args.latent = columns(0, rank);
  args.rope = columns(rank, rope);
  args.slot_mapping =
      TensorView::contiguous(const_cast<std::int64_t*>(context_.step->slots.data()), DType::kInt64, {x.rows});
  args.cache = view(kPageSize);
  // Scales that are powers of two: a latent read back is the same number in bfloat16 and in float32.
  args.recipe = Fp8Recipe::kFlashMla;
  KvCacheOptions options;
  options.num_threads = context_.threads;
  append_kv(args, options);
}

void CpuLatentCache::attend(const Matrix& q, const Matrix& out, const Lists& lists, Buffer& workspace) const {
  const ModelConfig& config = context_.config;
  const std::int64_t run = lists.run, n = lists.count, heads = config.num_attention_heads,
                     rank = config.kv_lora_rank;
  DenseFp8DecodeOptions options;
  options.softmax_scale = static_cast<float>(config.softmax_scale());
  options.causal = true;
  options.num_threads = context_.threads;
  // What both operations take.
  const auto fill = [&](auto& args) {
    args.q = TensorView::contiguous(q.data, context_.dtype, {n, run, heads, width()});
    args.block_table = int32s(lists.table, {n, lists.width});
    args.block_table.strides[0] = run * lists.width;
    args.cache_seqlens = int32s(lists.lengths, {n});
    args.out = TensorView::contiguous(out.data, context_.dtype, {n, run, heads, rank});
  };
  if (context_.cache_format) {
    DenseFp8DecodeArgs args;
    fill(args);
    args.cache = view(lists.page_size);
    const std::size_t bytes = dense_fp8_decode_workspace_size(args, lists.schedule, options);
    grow(workspace, bytes);
    dense_fp8_decode(args, lists.schedule, workspace.data(), bytes, options);
    return;
  }
  DenseDecodeArgs args;
  fill(args);
  args.k_cache = TensorView::contiguous(data_.data(), context_.dtype,
                                        {num_tokens() / lists.page_size, lists.page_size, 1, width()});
  const std::size_t bytes = dense_decode_workspace_size(args, lists.schedule, options);
  grow(workspace, bytes);
  dense_decode(args, lists.schedule, workspace.data(), bytes, options);
}

}  // namespace flash_mla::model
