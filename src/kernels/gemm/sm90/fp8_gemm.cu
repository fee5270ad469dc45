// Launches of fp8_gemm.cuh.

#include <algorithm>
#include <array>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/fp8_gemm.cuh"
#include "kernels/ptx/tensor_map.h"

namespace flash_mla::sm90 {
namespace {

using fp8::Params;

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

/// Bytes (matrices, rows, columns) as pairs, in boxes of 64 rows x 128 bytes.
CUtensorMap byte_map(const char* name, const void* data, std::int64_t columns, std::int64_t stride,
                     std::int64_t rows, std::int64_t matrices) {
  const TensorView view = TensorView::contiguous(const_cast<void*>(data), DType::kBFloat16,
                                                 {matrices, rows, columns / 2}, {DeviceType::kCuda, 0});
  return tensor_map<5>(name, view,
                       {MapDim{columns / 2, 2, fp8::kStepK / 2}, MapDim{rows, stride, fp8::kBoxRows},
                        MapDim{matrices, rows * stride, 1}, MapDim{1, 0, 1}, MapDim{1, 0, 1}});
}

template <class C>
cudaError_t run(const Params& p, int num_sms, cudaStream_t stream) {
  constexpr std::size_t kBytes = sizeof(fp8::Shared<C>) + 1024;
  if (const cudaError_t e = allow_shared_memory<fp8::fp8_gemm_kernel<C>>(kBytes)) return e;
  const Fp8Gemm& g = p.gemm;
  const std::int64_t units = g.units != nullptr ? g.max_units : p.dense_units;
  const std::int64_t most = std::min<std::int64_t>(units * p.column_tiles, num_sms);
  LaunchConfig config(static_cast<unsigned>(most), fp8::kThreads, kBytes, stream);
  return launch(config.programmatic(g.programmatic_launch), fp8::fp8_gemm_kernel<C>, p);
}

template <bool kBlocks>
cudaError_t choose(const Params& p, int num_sms, cudaStream_t stream) {
  const Fp8Gemm& g = p.gemm;
  if (g.silu_quantise) return run<fp8::Config<256, true, true, kBlocks>>(p, num_sms, stream);
  return g.tiles.columns == 128 ? run<fp8::Config<128, false, false, kBlocks>>(p, num_sms, stream)
                                : run<fp8::Config<256, false, false, kBlocks>>(p, num_sms, stream);
}

}  // namespace

bool fits_fp8_gemm(const Fp8Gemm& g) {
  if (g.m < 0 || g.n <= 0 || g.k <= 0 || g.experts < 1 || g.k % 16 != 0 || g.n % 8 != 0) return false;
  if (g.silu_quantise && g.n % 32 != 0) return false;
  if (g.x_stride < g.k || g.x_stride % 16 != 0) return false;
  if (!g.silu_quantise && (g.out_stride < g.n || g.out_stride % (g.out_fp32 ? 2 : 8) != 0)) return false;
  // Offsets of rows and scales are of 32 bits.
  const std::int64_t scales = (g.k + 127) / 128, most = std::max(g.m, g.x_rows);
  if (most > INT32_MAX / 2 || most * scales > INT32_MAX || (g.n + 7) / 8 * scales > INT32_MAX) return false;
  return aligned(g.x) && aligned(g.weight) && aligned(g.out);
}

Fp8Tiles plan_fp8_gemm(std::int64_t rows, std::int64_t n, std::int64_t experts, bool silu_quantise,
                       int num_sms) {
  Fp8Tiles tiles;
  const std::int64_t units = (rows + fp8::kRows - 1) / fp8::kRows * experts;
  if (!silu_quantise && units * ((n + 255) / 256) < num_sms) tiles.columns = 128;
  return tiles;
}

cudaError_t fp8_gemm(const Fp8Gemm& g, cudaStream_t stream) {
  if (!fits_fp8_gemm(g)) return cudaErrorInvalidValue;
  if (g.m == 0) return cudaSuccess;
  if (g.x == nullptr || g.x_scales == nullptr || g.weight == nullptr || g.weight_scales == nullptr ||
      g.out == nullptr || g.x_rows <= 0 || (g.silu_quantise && g.out_scales == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const bool one_kind = g.tiles.columns == 256 || (g.tiles.columns == 128 && !g.silu_quantise);
  if (!one_kind || g.tiles.group < 1) return cudaErrorInvalidValue;
  if (g.gather != g.silu_quantise || (g.units == nullptr && g.experts != 1)) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  Params p{};
  p.gemm = g;
  p.steps = static_cast<int>((g.k + fp8::kStepK - 1) / fp8::kStepK);
  const std::int64_t outputs = g.silu_quantise ? g.n / 2 : g.n;
  const int width = g.silu_quantise ? g.tiles.columns / 2 : g.tiles.columns;
  p.column_tiles = static_cast<int>((outputs + width - 1) / width);
  p.dense_units = static_cast<int>((g.m + fp8::kRows - 1) / fp8::kRows);
  p.scale_columns = static_cast<std::uint32_t>(p.steps);
  p.scale_rows = static_cast<std::uint32_t>((g.n + 7) / 8);
  p.x_map = byte_map("x", g.x, g.k, g.x_stride, g.x_rows, 1);
  p.weight_map = byte_map("weight", g.weight, g.k, g.k, g.n, g.experts);
  return g.whole_blocks ? choose<true>(p, num_sms, stream) : choose<false>(p, num_sms, stream);
}

}  // namespace flash_mla::sm90
