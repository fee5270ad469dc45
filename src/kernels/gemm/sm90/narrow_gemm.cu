// Launches of narrow_gemm.cuh.

#include <algorithm>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/narrow_gemm.cuh"
#include "kernels/ptx/tensor_map.h"

namespace flash_mla::sm90 {
namespace {

using narrow::Params;

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// int4: two rows in k bytes. As 16-bit columns.
CUtensorMap weight_map(const NarrowGemm& g) {
  const std::int64_t rows = g.e4m3 ? g.n : g.n / 2;
  const int box = g.e4m3 ? 2 * narrow::kBlockRows : narrow::kBlockRows;  // two blocks
  const TensorView view = TensorView::contiguous(const_cast<void*>(g.weight), DType::kBFloat16,
                                                 {g.experts, rows, g.k / 2}, {DeviceType::kCuda, 0});
  return tensor_map<5>("weight", view,
                       {MapDim{g.k / 2, 2, narrow::kStepK / 2}, MapDim{rows, g.k, box},
                        MapDim{g.experts, rows * g.k, 1}, MapDim{1, 0, 1}, MapDim{1, 0, 1}});
}

template <class C>
cudaError_t run(Params p, int num_sms, cudaStream_t stream) {
  constexpr std::size_t kBytes = sizeof(narrow::Shared<C>) + 1024;
  if (const cudaError_t e = allow_shared_memory<narrow::narrow_gemm_kernel<C>>(kBytes)) return e;
  const NarrowGemm& g = p.gemm;
  const std::int64_t outputs = C::kSilu ? g.n / 2 : g.n;
  p.column_tiles = static_cast<int>((outputs + C::kOutputs - 1) / C::kOutputs);
  p.dense_units = static_cast<int>((g.m + C::kRows - 1) / C::kRows);
  const std::int64_t units = g.units != nullptr ? g.max_units : p.dense_units;
  const std::int64_t most = std::min<std::int64_t>(units * p.column_tiles, num_sms);
  LaunchConfig config(static_cast<unsigned>(most), narrow::kThreads, kBytes, stream);
  return launch(config.programmatic(g.programmatic_launch), narrow::narrow_gemm_kernel<C>, p);
}

template <int kRows, narrow::Kind kKind>
cudaError_t choose(const Params& p, int num_sms, cudaStream_t stream) {
  return p.gemm.silu ? run<narrow::Config<kRows, true, kKind>>(p, num_sms, stream)
                     : run<narrow::Config<kRows, false, kKind>>(p, num_sms, stream);
}

template <narrow::Kind kKind>
cudaError_t choose_rows(const Params& p, int num_sms, cudaStream_t stream) {
  switch (p.gemm.rows_per_unit) {
    case 16:
      return choose<16, kKind>(p, num_sms, stream);
    case 32:
      return choose<32, kKind>(p, num_sms, stream);
    case 64:
      return choose<64, kKind>(p, num_sms, stream);
    default:
      break;
  }
  if constexpr (kKind == narrow::Kind::kW4A8) {
    if (p.gemm.rows_per_unit == 128) return choose<128, kKind>(p, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool fits_narrow_gemm(const NarrowGemm& g) {
  if (g.m < 0 || g.n <= 0 || g.k <= 0 || g.experts < 1 || g.k % 16 != 0 || g.n % 8 != 0) return false;
  if (g.silu && g.n % 16 != 0) return false;
  if (g.e4m3 && !g.bf16) return false;
  const bool quantises = g.silu && !g.bf16;
  if (!quantises && (g.out_stride < (g.silu ? g.n / 2 : g.n) || g.out_stride % 2 != 0)) return false;
  if (g.bf16 && (g.x_stride % 8 != 0 || (g.x_rows > 1 && g.x_stride < g.k))) return false;
  if (std::max(g.m, g.x_rows) > INT32_MAX / 2 || g.n > INT32_MAX / 2 || g.k > INT32_MAX / 2) return false;
  return aligned(g.x) && aligned(g.weight) && aligned(g.weight_scales) && aligned(g.out);
}

cudaError_t narrow_gemm(const NarrowGemm& g, cudaStream_t stream) {
  if (!fits_narrow_gemm(g)) return cudaErrorInvalidValue;
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
  p.steps = static_cast<int>((g.k + narrow::kStepK - 1) / narrow::kStepK);
  p.weight_map = weight_map(g);
  if (g.e4m3) return choose_rows<narrow::Kind::kW8A16>(p, num_sms, stream);
  return g.bf16 ? choose_rows<narrow::Kind::kW4A16>(p, num_sms, stream)
                : choose_rows<narrow::Kind::kW4A8>(p, num_sms, stream);
}

}  // namespace flash_mla::sm90
