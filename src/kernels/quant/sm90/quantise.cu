// quantise_fp8 on Hopper: rows to e4m3, tile by tile, with the CPU's bits.
//
// Tile:      one of the call's tiles, of any width, for each warp, 4 warps a block.
// Threads:   lane l has the elements l, l + 32, ... of the tile; of up to 256 they stay in registers between the largest
//            magnitude and the division, of more they are read twice.
// Memory:    none that is shared.
// Registers: some 30.

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/element.cuh"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/quant/recipe.h"
#include "kernels/quant/sm90/quantise.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kWarp = 32, kWarps = 4;
constexpr int kHeld = 8;  // elements of a lane in registers

struct Params {
  const void* x;
  std::int64_t x_stride;  // elements, as the others
  std::int64_t width, tiles, total;
  int tile;
  Fp8Recipe recipe;
  std::uint8_t* values;
  std::int64_t values_stride;
  void* scales;
  std::int64_t scales_stride_row, scales_stride_tile;
  bool e8m0;
};

/// A NaN is passed over.
__device__ __forceinline__ float largest(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) quantise_kernel(const __grid_constant__ Params p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const auto lane = static_cast<std::int64_t>(threadIdx.x % kWarp);
  const std::int64_t index = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (index >= p.total) return;
  const std::int64_t row = index / p.tiles, t = index % p.tiles, begin = t * p.tile;
  const std::int64_t count = min(std::int64_t{p.tile}, p.width - begin);
  const T* from = static_cast<const T*>(p.x) + row * p.x_stride + begin;
  std::uint8_t* to = p.values + row * p.values_stride + begin;

  float x[kHeld], most = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const std::int64_t at = lane + i * kWarp;
    x[i] = at < count ? as_float(from[at]) : 0.0f;
    most = fmaxf(most, fabsf(x[i]));
  }
  for (std::int64_t at = lane + kHeld * kWarp; at < count; at += kWarp)
    most = fmaxf(most, fabsf(as_float(from[at])));
  const float scale = quant::tile_scale(p.recipe, largest(most));
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const std::int64_t at = lane + i * kWarp;
    if (at < count) to[at] = quant::quantise_value(p.recipe, x[i], scale).bits;
  }
  for (std::int64_t at = lane + kHeld * kWarp; at < count; at += kWarp)
    to[at] = quant::quantise_value(p.recipe, as_float(from[at]), scale).bits;
  if (lane != 0) return;
  const std::int64_t at = row * p.scales_stride_row + t * p.scales_stride_tile;
  if (p.e8m0) {
    static_cast<std::uint8_t*>(p.scales)[at] = to_e8m0(scale).bits;
  } else {
    static_cast<float*>(p.scales)[at] = scale;
  }
}

}  // namespace

void quantise_fp8(const TensorView& x, int tile, Fp8Recipe recipe, const TensorView& values,
                  const TensorView& scales, void* stream) {
  require_device(x.device.index);
  const DeviceGuard guard(x.device.index);
  Params p{};
  p.x = x.data;
  p.x_stride = x.stride(0);
  p.width = x.size(1);
  p.tile = tile;
  p.tiles = scales.size(1);
  p.total = x.size(0) * p.tiles;
  p.recipe = recipe;
  p.values = values.ptr<std::uint8_t>();
  p.values_stride = values.stride(0);
  p.scales = scales.data;
  p.scales_stride_row = scales.stride(0);
  p.scales_stride_tile = scales.stride(1);
  p.e8m0 = scales.dtype == DType::kUInt8;
  if (p.total == 0) return;
  const std::int64_t blocks = (p.total + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) {
    throw Unsupported("x is " + x.describe() + ", " + std::to_string(p.total) +
                      " tiles; quantise_fp8 on sm90 takes up to 8589934588");
  }
  const auto kernel = x.dtype == DType::kFloat32   ? quantise_kernel<float>
                      : x.dtype == DType::kFloat16 ? quantise_kernel<Fp16>
                                                   : quantise_kernel<Bf16>;
  check(launch(LaunchConfig(dim3(static_cast<unsigned>(blocks)), kWarps * kWarp, 0,
                            static_cast<cudaStream_t>(stream))
                   .programmatic(),
               kernel, p),
        "quantise_fp8");
}

}  // namespace flash_mla::sm90
