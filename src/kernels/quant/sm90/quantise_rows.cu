// Rows of bfloat16 to e4m3 with a scale for every 128 columns.
//
// Tile:      128 columns of a row for half a warp, 8 neighbours each. Threads: 256, all alike. Memory: none.
// Registers: some 30.

#include <algorithm>
#include <cstdint>

#include "base/cuda/launch.h"
#include "kernels/gemm/sm90/narrow_gemm.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/words.cuh"
#include "kernels/quant/sm90/narrow_e4m3.cuh"
#include "kernels/quant/sm90/quantise_rows.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256, kLanes = 16, kWidth = 8;
constexpr float kLargest = 448.0f, kLeastScale = 1.17549435e-38f;

/// Of a lane's eight columns those with bit 1 clear are a word of the row, the others a second one 16 further.
__device__ __forceinline__ void store_for_int4(const QuantiseRows& p, std::int64_t row, std::int64_t group,
                                               std::int64_t groups, int lane, const std::uint32_t (&codes)[2],
                                               float scale) {
  auto* const to = static_cast<std::uint8_t*>(p.codes) + (row * groups + group) * (kLanes * kWidth);
  const int first = int4_order(lane * kWidth);
  // Columns 0, 4, 1, 5 and 2, 6, 3, 7.
  *reinterpret_cast<std::uint32_t*>(to + first) = __byte_perm(codes[0], codes[1], 0x5140);
  *reinterpret_cast<std::uint32_t*>(to + first + 16) = __byte_perm(codes[0], codes[1], 0x7362);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t wide = ptx::widen_e4m3(static_cast<std::uint16_t>(codes[i / 2] >> (16 * (i % 2))));
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(wide));
    sum += pair.x + pair.y;
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xFFFFu << (threadIdx.x % 32 / kLanes * kLanes), sum, mask);
  }
  if (lane == 0) p.offsets[row * groups + group] = 8.0f * scale * sum;
}

__global__ __launch_bounds__(kThreads) void quantise(const QuantiseRows p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t groups = (p.columns + kLanes * kWidth - 1) / (kLanes * kWidth);
  const std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t row = at / groups, group = at % groups;
  const std::int64_t column = group * kLanes * kWidth + lane * kWidth;
  const bool inside = row < p.rows && column < p.columns;
  uint4 words = make_uint4(0, 0, 0, 0);
  if (inside) {
    words = __ldcg(
        reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(p.x) + row * p.x_stride + column));
  }
  const std::uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  float x[kWidth], highest = 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x[i] = __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xFFFF0000u);
    highest = fmaxf(highest, fabsf(x[i]));
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
  }
  if (row >= p.rows || (!inside && p.offsets == nullptr)) return;
  const float scale = fmaxf(highest * (1.0f / kLargest), kLeastScale), factor = 1.0f / scale;
  std::uint32_t codes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* const y = x + 4 * i;
    codes[i] = static_cast<std::uint32_t>(narrow_e4m3(y[0] * factor, y[1] * factor)) |
               static_cast<std::uint32_t>(narrow_e4m3(y[2] * factor, y[3] * factor)) << 16;
  }
  if (p.offsets != nullptr) {
    store_for_int4(p, row, group, groups, lane, codes, scale);
  } else {
    *reinterpret_cast<uint2*>(static_cast<std::uint8_t*>(p.codes) + row * p.columns + column) =
        make_uint2(codes[0], codes[1]);
  }
  if (lane == 0) p.scales[row * groups + group] = scale;
}

bool aligned(const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }

}  // namespace

cudaError_t quantise_rows(const QuantiseRows& p, cudaStream_t stream) {
  if (p.rows < 0 || p.columns < 0 || p.columns % kWidth != 0) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.columns == 0) return cudaSuccess;
  if (p.x == nullptr || p.codes == nullptr || p.scales == nullptr || p.x_stride % kWidth != 0 ||
      (p.rows > 1 && p.x_stride < p.columns) || !aligned(p.x, 16) || !aligned(p.codes, 8)) {
    return cudaErrorInvalidValue;
  }
  const std::int64_t groups = (p.columns + kLanes * kWidth - 1) / (kLanes * kWidth);
  const std::int64_t blocks = (p.rows * groups * kLanes + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  LaunchConfig config(static_cast<unsigned>(blocks), kThreads, 0, stream);
  return launch(config.programmatic(p.programmatic_launch), quantise, p);
}

}  // namespace flash_mla::sm90
