// e4m3 weights to bfloat16, for products that read bfloat16 alone.
//
// Tile:    16 neighbouring columns of a row for each thread, or one where rows are not aligned. Threads: 256, all
//          alike. Memory: none.

#include <cuda_bf16.h>

#include <algorithm>

#include "base/cuda/launch.h"
#include "base/fp8.h"
#include "kernels/gemm/sm90/widen_e4m3.cuh"
#include "kernels/gemm/sm90/widen_weights.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 8 * 132;

template <int kWidth>
__global__ __launch_bounds__(kThreads) void widen(const WidenWeights p) {
  const std::int64_t pieces = p.columns / kWidth, count = p.rows * pieces;
  const std::int64_t scale_columns = (p.columns + kE4m3ScaleColumns - 1) / kE4m3ScaleColumns;
  const std::int64_t stride = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const std::int64_t row = i / pieces, column = i % pieces * kWidth;
    const float scale = __ldg(p.scales + row / kE4m3ScaleRows * scale_columns + column / kE4m3ScaleColumns);
    if constexpr (kWidth == 16) {
      const uint4 codes = __ldg(static_cast<const uint4*>(p.codes) + i);
      uint4* const out = static_cast<uint4*>(p.out) + 2 * i;
      out[0] = widen_e4m3(codes.x, codes.y, scale);
      out[1] = widen_e4m3(codes.z, codes.w, scale);
    } else {
      static_cast<__nv_bfloat16*>(p.out)[i] =
          __float2bfloat16(to_float(static_cast<const E4m3*>(p.codes)[i]) * scale);
    }
  }
}

__device__ unsigned long long mix(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// Sums of four 16-bit uniforms, as fill_random() of kernels/rows makes them.
__global__ __launch_bounds__(kThreads) void fill(std::uint8_t* out, std::int64_t count,
                                                 unsigned long long seed) {
  const std::int64_t stride = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const unsigned long long bits =
        mix(mix(seed) + static_cast<unsigned long long>(i) * 0x9e3779b97f4a7c15ull);
    float sum = 0;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>((bits >> (16 * j)) & 0xFFFF) + 0.5f;
    out[i] = to_e4m3((sum / 65536.0f - 2.0f) * 1.7320508f * kRandomE4m3Deviation).bits;
  }
}

unsigned blocks(std::int64_t count) {
  return static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMaxBlocks));
}

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace

cudaError_t widen_weights(const WidenWeights& p, cudaStream_t stream) {
  if (p.rows < 0 || p.columns < 0) return cudaErrorInvalidValue;
  const std::int64_t count = p.rows * p.columns;
  if (count == 0) return cudaSuccess;
  if (p.codes == nullptr || p.scales == nullptr || p.out == nullptr) return cudaErrorInvalidValue;
  const bool wide = p.columns % 16 == 0 && aligned(p.codes) && aligned(p.out);
  const LaunchConfig config(blocks(wide ? count / 16 : count), kThreads, 0, stream);
  return launch(config, wide ? widen<16> : widen<1>, p);
}

cudaError_t fill_random_e4m3(void* codes, std::int64_t count, std::uint64_t seed, cudaStream_t stream) {
  if (count < 0 || (count > 0 && codes == nullptr)) return cudaErrorInvalidValue;
  return launch(LaunchConfig(blocks(count), kThreads, 0, stream), fill, static_cast<std::uint8_t*>(codes),
                count, static_cast<unsigned long long>(seed));
}

}  // namespace flash_mla::sm90
