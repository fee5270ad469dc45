#pragma once

// Q as the products over e4m3 want it: fp16, each row divided by a power of two that makes its largest element 2^14 to
// 2^15, the columns of a chunk in the order of query_word. In place, by the consumers, once for a request or split.
// Where the cache's rope part is bfloat16, so is the last chunk.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <bool kBf16>
__device__ __forceinline__ float2 unpack2(std::uint32_t x) {
  if constexpr (kBf16) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(x));
  }
}

/// Of eight 16-bit elements the largest magnitudes, of the even and of the odd ones.
__device__ __forceinline__ std::uint32_t magnitudes(uint4 x) {
  constexpr std::uint32_t kMagnitude = 0x7FFF7FFFu;
  return __vmaxu2(__vmaxu2(x.x & kMagnitude, x.y & kMagnitude), __vmaxu2(x.z & kMagnitude, x.w & kMagnitude));
}

/// Words of a row of a chunk, reordered and converted.
template <bool kFromBf16, bool kToBf16>
__device__ __forceinline__ void convert_row(std::uint32_t chunk, int row, float factor) {
  std::uint32_t x[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 four = ptx::load_shared<uint4>(ptx::swizzled_word(chunk, row, i));
    x[4 * i] = four.x;
    x[4 * i + 1] = four.y;
    x[4 * i + 2] = four.z;
    x[4 * i + 3] = four.w;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float2 f = unpack2<kFromBf16>(x[i]);
    x[i] = pack2<kToBf16>(f.x * factor, f.y * factor);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ptx::store_shared_16(ptx::swizzled_word(chunk, row, i),
                         uint4{x[query_word(4 * i)], x[query_word(4 * i + 1)], x[query_word(4 * i + 2)],
                               x[query_word(4 * i + 3)]});
  }
}

/// By all consumers, four to a row. `scale` turns scores into powers of two.
template <bool kBf16, bool kRopeIsBf16, int kHeads>
__device__ __forceinline__ void convert_query(Smem<kHeads>& s, float scale) {
  const int row = static_cast<int>(threadIdx.x) / 4, quarter = static_cast<int>(threadIdx.x) % 4;
  if (row >= kHeads) return;
  std::uint32_t most = 0;
#pragma unroll 1
  for (int c = quarter; c < kChunks; c += 4) {
    const std::uint32_t chunk = ptx::smem_address(s.q.at(c));
#pragma unroll
    for (int i = 0; i < 8; ++i)
      most = __vmaxu2(most, magnitudes(ptx::load_shared<uint4>(ptx::swizzled_word(chunk, row, i))));
  }
  most = max(most >> 16, most & 0xFFFFu);
  most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
  most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
  // Infinite and NaN elements stay so. 2^113 is the least power whose reciprocal is still a normal number here.
  const int e = min(max(exponent_of(unpack2<kBf16>(most).x) - 14, -113), 113);
  const float factor = power_of_two(-e);
  if (quarter == 0) s.q_scale[row] = power_of_two(e) * scale;
#pragma unroll 1
  for (int c = quarter; c < kChunks; c += 4) {
    const std::uint32_t chunk = ptx::smem_address(s.q.at(c));
    if (kRopeIsBf16 && c == kChunks - 1) {
      convert_row<kBf16, true>(chunk, row, factor);
    } else {
      convert_row<kBf16, false>(chunk, row, factor);
    }
  }
}

}  // namespace flash_mla::sm90::dense_fp8
