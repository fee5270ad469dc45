// Host side of dense decode over FP8 caches on Hopper: what it accepts, the workspace, how the work is shaped. Caches of
// bfloat16 and float16 rows are dense decode's.

#include "kernels/attention/dense_fp8_decode/sm90/dense_fp8_decode.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "base/cuda/device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/call.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_fp8_decode/sm90/launch.h"
#include "kv/format.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::int64_t kAlignment = 16;  // bytes, of what a bulk copy brings

/// The call as dense_decode has it.
DenseDecodeArgs dense_args(const DenseFp8DecodeArgs& a) {
  DenseDecodeArgs d;
  d.q = a.q;
  d.k_cache = a.cache.data;
  d.block_table = a.block_table;
  d.cache_seqlens = a.cache_seqlens;
  d.out = a.out;
  d.lse = a.lse;
  return d;
}

void check_pool(const kv::Pool& pool) {
  if (reinterpret_cast<std::uintptr_t>(pool.data) % kAlignment != 0) {
    throw InvalidArgument(fmt::format("cache.data is {}, expected a pointer aligned to {} bytes",
                                      fmt::ptr(pool.data), kAlignment));
  }
  for (const auto& [stride, index] : {std::pair(pool.page_stride, 0), std::pair(pool.token_stride, 1)}) {
    if (stride % kAlignment != 0) {
      throw InvalidArgument(
          fmt::format("cache.stride[{}] is {} bytes, expected a multiple of {}", index, stride, kAlignment));
    }
  }
}

}  // namespace

void check_supported(const DenseFp8DecodeArgs& a, const DecodeScheduleView& s) {
  const DenseDecodeArgs d = dense_args(a);
  if (!kv::is_fp8(a.cache.format)) {
    sm90::check_supported(d, s);
    return;
  }
  require_device(a.q.device.index);
  if (a.q.dtype == DType::kFloat32) {
    throw Unsupported("q is float32; dense_fp8_decode on sm90 takes bfloat16 and float16");
  }
  const kv::Pool pool = kv::make_pool(a.cache);
  if (pool.format != KvFormat::kFp8V32 && pool.format != KvFormat::kFp8Tensor) {
    throw Unsupported(fmt::format(
        "cache.format is {}; dense_fp8_decode on sm90 takes fp8_v32, fp8_tensor, bfloat16 and float16",
        kv_format_name(pool.format)));
  }
  check_pool(pool);
  check_work(d, s);
}

std::size_t dense_fp8_decode_workspace_size(const DenseFp8DecodeArgs& a, const DecodeScheduleView& s) {
  return sm90::dense_decode_workspace_size(dense_args(a), s);
}

void dense_fp8_decode(const DenseFp8DecodeArgs& a, const DecodeScheduleView& s, void* workspace,
                      float softmax_scale, bool causal, void* stream) {
  const DenseDecodeArgs d = dense_args(a);
  if (!kv::is_fp8(a.cache.format)) {
    sm90::dense_decode(d, s, workspace, softmax_scale, causal, stream);
    return;
  }
  const DeviceGuard guard(a.q.device.index);
  const kv::Pool pool = kv::make_pool(a.cache);
  DenseFp8Params p{};
  static_cast<DecodeParams&>(p) = decode_params(d, s, workspace, softmax_scale, causal);
  p.cache = pool.data;
  p.page_stride = pool.page_stride;
  p.token_stride = pool.token_stride;
  // Rows of kFp8Tensor are spread in shared memory, so they come one by one.
  p.whole_tiles = pool.format == KvFormat::kFp8V32 && pool.page_size % kTileTokens == 0 &&
                  pool.token_stride == kv::Fp8V32::kTokenBytes;
  p.cache_scale = pool.format == KvFormat::kFp8Tensor ? pool.scale : 1.0f;
  launch_dense_fp8_decode(p, a.q, pool.format, plan_of(d, p), stream);
}

}  // namespace flash_mla::sm90
