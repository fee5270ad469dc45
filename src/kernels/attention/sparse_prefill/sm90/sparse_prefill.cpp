// Host side of sparse prefill on Hopper: what it accepts, tensor maps.

#include "kernels/attention/sparse_prefill/sm90/sparse_prefill.h"

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <numbers>
#include <utility>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/sparse_prefill/sm90/launch.h"
#include "kernels/ptx/tensor_map.h"
#include "kv/format.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kUnit = 16;  // bytes
constexpr int kRows = 64;  // heads of an item

std::int64_t head_blocks_of(std::int64_t h_q) { return (h_q + kRows - 1) / kRows; }

void check_pool(const KvCacheView& cache) {
  const kv::Pool pool = kv::make_pool(cache);
  const TensorView& t = cache.data;
  if (reinterpret_cast<std::uintptr_t>(t.data) % kUnit != 0) {
    throw InvalidArgument(
        fmt::format("cache.data is {}, expected a pointer aligned to {} bytes", fmt::ptr(t.data), kUnit));
  }
  for (const auto& [stride, index] : {std::pair(pool.page_stride, 0), std::pair(pool.token_stride, 1)}) {
    if (stride % kUnit != 0 || stride < 0) {
      throw InvalidArgument(
          fmt::format("cache.stride[{}] is {} bytes, expected a multiple of {}", index, stride, kUnit));
    }
  }
  // 32 bits count units of 16 bytes, and V4's scales in units of 8.
  const std::int64_t most = std::int64_t{pool.format == KvFormat::kFp8V4 ? 32 : 64} << 30;
  if (const std::int64_t bytes =
          pool.page_stride * std::max<std::int64_t>(pool.num_pages, 1) + pool.token_stride * pool.page_size;
      bytes >= most || pool.num_slots() > INT32_MAX) {
    throw Unsupported(
        fmt::format("cache is {}, {} bytes from end to end; sparse_prefill on sm90 takes less than {}",
                    t.describe(), bytes, most));
  }
}

/// (columns of a chunk, heads, tokens, chunks, 1).
CUtensorMap map_of(const char* name, const TensorView& t, int box_chunks) {
  const int chunks = static_cast<int>(t.size(2) / 64);
  return tensor_map<5>(name, t,
                       {{{64, 0, 64},
                         {t.size(1), t.stride(1) * 2, kRows},
                         {t.size(0), t.stride(0) * 2, 1},
                         {chunks, 128, box_chunks},
                         {1, 0, 1}}});
}

template <class T>
const T* pointer(const TensorView& t) {
  return t.defined() ? t.ptr<const T>() : nullptr;
}

void set_selection(SparsePrefillParams& p, const SparsePrefillArgs& a) {
  const kv::Pool pool = kv::make_pool(a.cache);
  p.cache = pool.data;
  p.page_units = static_cast<std::uint32_t>(pool.page_stride / kUnit);
  p.token_units = static_cast<std::uint32_t>(pool.token_stride / kUnit);
  p.page_size = static_cast<std::uint32_t>(pool.page_size);
  p.by_page_size = divisor(p.page_size);
  p.is_flat = !a.block_table.defined() && pool.format != KvFormat::kFp8V4 &&
              (pool.num_pages <= 1 || pool.page_stride == pool.page_size * pool.token_stride);
  p.slots = static_cast<std::uint32_t>(pool.num_slots());
  p.cache_scale = pool.format == KvFormat::kFp8Tensor ? pool.scale : 1.0f;
  p.indices = a.indices.ptr<const std::int32_t>();
  p.indices_stride = a.indices.stride(0);
  p.topk_length = pointer<std::int32_t>(a.topk_length);
  p.topk = static_cast<int>(a.indices.size(1));
  if (!a.cu_seqlens_q.defined()) return;
  p.batch = static_cast<int>(a.cu_seqlens_q.size(0) - 1);
  p.cu_seqlens_q = a.cu_seqlens_q.ptr<const std::int32_t>();
  p.cu_seqlens_k = pointer<std::int32_t>(a.cu_seqlens_k);
  p.block_table = pointer<std::int32_t>(a.block_table);
  p.cache_seqlens = pointer<std::int32_t>(a.cache_seqlens);
  if (a.block_table.defined()) p.block_table_stride = a.block_table.stride(0);
}

}  // namespace

void check_supported(const SparsePrefillArgs& a) {
  require_device(a.q.device.index);
  check_pool(a.cache);
  require_stride(a.q, "q");
  require_stride(a.out, "out");
  if (a.q.size(0) > INT32_MAX / 2 / head_blocks_of(a.q.size(1))) {
    throw Unsupported(fmt::format("q.shape is ({}, {}, {}); sparse_prefill on sm90 takes fewer query rows",
                                  a.q.size(0), a.q.size(1), a.q.size(2)));
  }
}

void sparse_prefill(const SparsePrefillArgs& a, float softmax_scale, void* stream) {
  const DeviceGuard guard(a.q.device.index);
  const std::int64_t h_q = a.q.size(1);
  SparsePrefillParams p{};
  set_selection(p, a);
  p.head_blocks = static_cast<int>(head_blocks_of(h_q));
  p.by_head_blocks = divisor(static_cast<std::uint32_t>(p.head_blocks));
  p.items = static_cast<int>(a.q.size(0)) * p.head_blocks;
  p.h_q = static_cast<int>(h_q);
  p.scale_log2 = softmax_scale * std::numbers::log2e_v<float>;
  p.attn_sink = pointer<float>(a.attn_sink);
  p.out = a.out.data;
  p.out_stride_n = a.out.stride(0);
  p.out_stride_h = a.out.stride(1);
  if (a.max_logits.defined()) {
    p.max_logits = a.max_logits.ptr<float>();
    p.max_logits_stride_n = a.max_logits.stride(0);
    p.max_logits_stride_h = a.max_logits.stride(1);
  }
  if (a.lse.defined()) {
    p.lse = a.lse.ptr<float>();
    p.lse_stride_n = a.lse.stride(0);
    p.lse_stride_h = a.lse.stride(1);
  }
  int sms = 0;
  check(multiprocessors(sms), "cudaDeviceGetAttribute");
  const int head_dim = static_cast<int>(a.q.size(2));
  const QueryView q{static_cast<const std::uint16_t*>(a.q.data), a.q.stride(0), a.q.stride(1)};
  launch_sparse_prefill(p, q, map_of("q", a.q, head_dim / 64), map_of("out", a.out, 4),
                        a.q.dtype == DType::kBFloat16, a.cache.format, head_dim, sms, stream);
}

}  // namespace flash_mla::sm90
