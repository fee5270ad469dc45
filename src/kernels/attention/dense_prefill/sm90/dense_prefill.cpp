// Host side of un-absorbed prefill on Hopper: what it accepts, tensor maps.

#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <numbers>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_prefill/sm90/launch.h"
#include "kernels/ptx/tensor_map.h"

namespace flash_mla::sm90 {
namespace {

using Heads = prefill::LatentHeads;
static_assert(kPrefillHeadDim == Heads::kHeadDim && kPrefillHeadDimNope == Heads::kHeadDimNope &&
              kPrefillHeadDimV == Heads::kHeadDimV && Heads::kTileKeys == prefill::kTileRows);

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  return fmt::format("({})", fmt::join(shape, ", "));
}

void require(const TensorView& t, const char* name, DType dtype, std::initializer_list<std::int64_t> shape,
             const Device& device) {
  bool same = t.dtype == dtype && t.device == device && t.rank == static_cast<int>(shape.size());
  for (int i = 0; same && i < t.rank; ++i) same = t.size(i) == *(shape.begin() + i);
  if (!same) {
    throw InvalidArgument(fmt::format("{} is {}, expected {} {} on the device of q ({})", name, t.describe(),
                                      dtype_name(dtype), shape_text(shape), device.index));
  }
  if (t.data == nullptr && t.numel() > 0) throw InvalidArgument(fmt::format("{}.data is null", name));
}

/// Of q, k_nope, k_rope, v and out: contiguous rows that 16-byte accesses can reach.
void require_rows(const TensorView& t, const char* name) {
  if (t.stride(t.rank - 1) != 1) {
    throw InvalidArgument(
        fmt::format("{}.stride[{}] is {}, expected 1", name, t.rank - 1, t.stride(t.rank - 1)));
  }
  require_stride(t, name);
}

void require_offsets(const TensorView& t, const char* name, std::int64_t count, const Device& device) {
  require(t, name, DType::kInt32, {count}, device);
  if (count > 1 && t.stride(0) != 1)
    throw InvalidArgument(fmt::format("{}.stride[0] is {}, expected 1", name, t.stride(0)));
}

/// (columns of a chunk, tokens, chunks, heads); boxes are 128 tokens of all chunks of a head.
CUtensorMap map_of(const char* name, const TensorView& t, const TensorView& q) {
  TensorView from = t;
  const bool per_head = t.rank == 3;
  if (t.size(0) == 0) from.data = q.data;  // no copy follows the map, but it has to be sound
  const int chunks = static_cast<int>(t.size(t.rank - 1)) / 64;
  return tensor_map<4>(name, from,
                       {{{64, 0, 64},
                         {std::max<std::int64_t>(t.size(0), 1), t.stride(0) * 2, prefill::kTileRows},
                         {chunks, 128, chunks},
                         {per_head ? t.size(1) : 1, per_head ? t.stride(1) * 2 : 0, 1}}});
}

}  // namespace

std::size_t dense_prefill_workspace_size() { return 256; }

void check_supported(const DensePrefillArgs& a) {
  if (a.q.device.type != DeviceType::kCuda) {
    throw InvalidArgument(fmt::format("q is {}, expected a tensor on a CUDA device", a.q.describe()));
  }
  require_device(a.q.device.index);
  if (a.q.dtype != DType::kBFloat16 && a.q.dtype != DType::kFloat16) {
    throw Unsupported(
        fmt::format("q is {}; the sm90 prefill kernel takes bfloat16 and float16", dtype_name(a.q.dtype)));
  }
  if (a.q.rank != 3 || a.q.size(2) != kPrefillHeadDim)
    throw InvalidArgument(fmt::format("q is {}, expected (total_q, num_heads, 192)", a.q.describe()));
  if (a.v.rank != 3)
    throw InvalidArgument(fmt::format("v is {}, expected (total_k, num_heads, 128)", a.v.describe()));
  const Device device = a.q.device;
  const std::int64_t total_q = a.q.size(0), heads = a.q.size(1), total_k = a.v.size(0);
  require(a.k_nope, "k_nope", a.q.dtype, {total_k, heads, kPrefillHeadDimNope}, device);
  require(a.k_rope, "k_rope", a.q.dtype, {total_k, kPrefillHeadDimRope}, device);
  require(a.v, "v", a.q.dtype, {total_k, heads, kPrefillHeadDimV}, device);
  require(a.out, "out", a.q.dtype, {total_q, heads, kPrefillHeadDimV}, device);
  if (a.lse.defined()) require(a.lse, "lse", DType::kFloat32, {heads, total_q}, device);
  if (a.cu_seqlens_q.rank != 1 || a.cu_seqlens_q.size(0) < 1) {
    throw InvalidArgument(
        fmt::format("cu_seqlens_q is {}, expected int32 (num_seqs + 1)", a.cu_seqlens_q.describe()));
  }
  require_offsets(a.cu_seqlens_q, "cu_seqlens_q", a.cu_seqlens_q.size(0), device);
  require_offsets(a.cu_seqlens_k, "cu_seqlens_k", a.cu_seqlens_q.size(0), device);
  require_rows(a.q, "q");
  require_rows(a.k_nope, "k_nope");
  require_rows(a.k_rope, "k_rope");
  require_rows(a.v, "v");
  require_rows(a.out, "out");
  // Offsets, and items (see prefill/work.cuh), are counted in 32 bits.
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
  if (total_q > kMost || total_k > kMost ||
      heads > kMost / (total_q / prefill::kTileRows + a.cu_seqlens_q.size(0))) {
    throw Unsupported(fmt::format(
        "total_q is {}, total_k {}, num_heads {}; the sm90 prefill kernel counts rows and tiles of "
        "128 rows x heads in 32 bits",
        total_q, total_k, heads));
  }
}

void dense_prefill(const DensePrefillArgs& a, float softmax_scale, bool causal, void* workspace,
                   void* stream) {
  check_supported(a);
  if (!(softmax_scale > 0 && std::isfinite(softmax_scale)))
    throw InvalidArgument(fmt::format("softmax_scale is {}, expected a positive number", softmax_scale));
  if (workspace == nullptr || reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) {
    throw InvalidArgument(
        fmt::format("workspace is {}, expected device memory aligned to 16 bytes", workspace));
  }
  const std::int64_t num_seqs = a.cu_seqlens_q.size(0) - 1;
  if (a.q.size(0) == 0 || a.q.size(1) == 0 || num_seqs == 0) return;
  const DeviceGuard guard(a.q.device.index);
  prefill::Params p{};
  p.num_seqs = static_cast<int>(num_seqs);
  p.num_heads = static_cast<int>(a.q.size(1));
  p.causal = causal;
  p.scale_log2 = softmax_scale * std::numbers::log2e_v<float>;
  p.cu_seqlens_q = a.cu_seqlens_q.ptr<const std::int32_t>();
  p.cu_seqlens_k = a.cu_seqlens_k.ptr<const std::int32_t>();
  p.taken = static_cast<std::int32_t*>(workspace);
  p.out = a.out.data;
  p.out_stride_token = a.out.stride(0);
  p.out_stride_head = a.out.stride(1);
  if (a.lse.defined()) {
    p.lse = a.lse.ptr<float>();
    p.lse_stride_head = a.lse.stride(0);
    p.lse_stride_token = a.lse.stride(1);
  }
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a.q.device.index),
        "cudaDeviceGetAttribute");
  // The most row tiles that num_seqs lengths can have in all.
  const std::int64_t row_tiles = (a.q.size(0) + (prefill::kTileRows - 1) * num_seqs) / prefill::kTileRows;
  prefill::launch(p, map_of("q", a.q, a.q), map_of("k_nope", a.k_nope, a.q), map_of("k_rope", a.k_rope, a.q),
                  map_of("v", a.v, a.q), a.q.dtype == DType::kBFloat16, row_tiles * a.q.size(1), sms, stream);
}

}  // namespace flash_mla::sm90
