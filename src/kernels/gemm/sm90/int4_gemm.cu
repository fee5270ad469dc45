// Launches of int4_gemm.cuh.

#include <algorithm>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/int4_gemm.cuh"
#include "kernels/ptx/tensor_map.h"

namespace flash_mla::sm90 {
namespace {

using int4::Params;

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// Two rows in k bytes, as 16-bit columns.
CUtensorMap weight_map(const Int4Gemm& g) {
  const TensorView view = TensorView::contiguous(const_cast<void*>(g.weight), DType::kBFloat16,
                                                 {g.experts, g.n / 2, g.k / 2}, {DeviceType::kCuda, 0});
  return tensor_map<5>("weight", view,
                       {MapDim{g.k / 2, 2, int4::kStepK / 2}, MapDim{g.n / 2, g.k, int4::kBoxRows},
                        MapDim{g.experts, g.n / 2 * g.k, 1}, MapDim{1, 0, 1}, MapDim{1, 0, 1}});
}

template <class C>
cudaError_t run(Params p, int num_sms, cudaStream_t stream) {
  constexpr std::size_t kBytes = sizeof(int4::Shared<C>) + 1024;
  if (const cudaError_t e = allow_shared_memory<int4::int4_gemm_kernel<C>>(kBytes)) return e;
  const Int4Gemm& g = p.gemm;
  const std::int64_t outputs = C::kSilu ? g.n / 2 : g.n;
  p.column_tiles = static_cast<int>((outputs + C::kOutputs - 1) / C::kOutputs);
  p.dense_units = static_cast<int>((g.m + C::kRows - 1) / C::kRows);
  const std::int64_t units = g.units != nullptr ? g.max_units : p.dense_units;
  const std::int64_t most = std::min<std::int64_t>(units * p.column_tiles, num_sms);
  LaunchConfig config(static_cast<unsigned>(most), int4::kThreads, kBytes, stream);
  return launch(config.programmatic(g.programmatic_launch), int4::int4_gemm_kernel<C>, p);
}

template <int kRows, bool kBf16>
cudaError_t choose(const Params& p, int num_sms, cudaStream_t stream) {
  return p.gemm.silu ? run<int4::Config<kRows, true, kBf16>>(p, num_sms, stream)
                     : run<int4::Config<kRows, false, kBf16>>(p, num_sms, stream);
}

}  // namespace

bool fits_int4_gemm(const Int4Gemm& g) {
  if (g.m < 0 || g.n <= 0 || g.k <= 0 || g.experts < 1 || g.k % 16 != 0 || g.n % 8 != 0) return false;
  if (g.silu && g.n % 16 != 0) return false;
  const bool quantises = g.silu && !g.bf16;
  if (!quantises && (g.out_stride < (g.silu ? g.n / 2 : g.n) || g.out_stride % 2 != 0)) return false;
  if (g.bf16 && (g.x_stride % 8 != 0 || (g.x_rows > 1 && g.x_stride < g.k))) return false;
  if (std::max(g.m, g.x_rows) > INT32_MAX / 2 || g.n > INT32_MAX / 2 || g.k > INT32_MAX / 2) return false;
  return aligned(g.x) && aligned(g.weight) && aligned(g.weight_scales) && aligned(g.out);
}

cudaError_t int4_gemm(const Int4Gemm& g, cudaStream_t stream) {
  if (!fits_int4_gemm(g)) return cudaErrorInvalidValue;
  if (g.m == 0) return cudaSuccess;
  if (g.x == nullptr || g.weight == nullptr || g.weight_scales == nullptr || g.out == nullptr ||
      g.x_rows <= 0 || (!g.bf16 && (g.x_scales == nullptr || g.x_offsets == nullptr)) ||
      (g.silu && !g.bf16 && (g.out_scales == nullptr || g.out_offsets == nullptr)) ||
      (g.units == nullptr && g.experts != 1)) {
    return cudaErrorInvalidValue;
  }
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  Params p{};
  p.gemm = g;
  p.steps = static_cast<int>((g.k + int4::kStepK - 1) / int4::kStepK);
  p.weight_map = weight_map(g);
  switch (g.rows_per_unit) {
    case 16:
      return g.bf16 ? choose<16, true>(p, num_sms, stream) : choose<16, false>(p, num_sms, stream);
    case 32:
      return g.bf16 ? choose<32, true>(p, num_sms, stream) : choose<32, false>(p, num_sms, stream);
    case 64:
      return g.bf16 ? choose<64, true>(p, num_sms, stream) : choose<64, false>(p, num_sms, stream);
    case 128:
      return g.bf16 ? cudaErrorInvalidValue : choose<128, false>(p, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace flash_mla::sm90
