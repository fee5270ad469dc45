#pragma once

// e4m3 rows in shared memory to the registers of a product's first factor: K (rows are keys) of S^T = K Q^T, and V
// transposed (rows are columns of V) of O^T = V^T P^T. e4m3 is exact in fp16; scales have been divided by a power of two
// of their key, which S and P take over, so that they fit too.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::dense_fp8 {

/// A of one m64nNk16.
using Fragment = std::uint32_t[4];

__device__ __forceinline__ __half2 as_half2(std::uint32_t x) { return reinterpret_cast<const __half2&>(x); }
__device__ __forceinline__ std::uint32_t bits_of(__half2 x) {
  return reinterpret_cast<const std::uint32_t&>(x);
}

/// The lower or the upper two e4m3 of a word, times `factor`.
template <bool kScaled, int kHalf>
__device__ __forceinline__ std::uint32_t widen2(std::uint32_t x, __half2 factor) {
  const std::uint32_t h = ptx::widen_e4m3(static_cast<std::uint16_t>(x >> (16 * kHalf)));
  return kScaled ? bits_of(__hmul2(as_half2(h), factor)) : h;
}
__device__ __forceinline__ std::uint32_t scale_bf16(std::uint32_t x, __nv_bfloat162 factor) {
  const __nv_bfloat162 y = __hmul2(reinterpret_cast<const __nv_bfloat162&>(x), factor);
  return reinterpret_cast<const std::uint32_t&>(y);
}

/// Four slices of K from 16 e4m3 of this lane's first and of its second key.
template <bool kScaled>
__device__ __forceinline__ void key_fragments(Fragment (&a)[4], const uint4 (&x)[2], __half2 f0, __half2 f1) {
  const std::uint32_t first[4] = {x[0].x, x[0].y, x[0].z, x[0].w};
  const std::uint32_t second[4] = {x[1].x, x[1].y, x[1].z, x[1].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i][0] = widen2<kScaled, 0>(first[i], f0);
    a[i][1] = widen2<kScaled, 0>(second[i], f1);
    a[i][2] = widen2<kScaled, 1>(first[i], f0);
    a[i][3] = widen2<kScaled, 1>(second[i], f1);
  }
}

/// Two slices (2 kPart and the next) of a bfloat16 rope part, from 8 elements of both keys.
template <int kPart>
__device__ __forceinline__ void rope_fragments(Fragment (&a)[4], const uint4& first, const uint4& second,
                                               __nv_bfloat162 f0, __nv_bfloat162 f1) {
  Fragment &low = a[2 * kPart], &high = a[2 * kPart + 1];
  low[0] = scale_bf16(first.x, f0);
  low[1] = scale_bf16(second.x, f1);
  low[2] = scale_bf16(first.y, f0);
  low[3] = scale_bf16(second.y, f1);
  high[0] = scale_bf16(first.z, f0);
  high[1] = scale_bf16(second.z, f1);
  high[2] = scale_bf16(first.w, f0);
  high[3] = scale_bf16(second.w, f1);
}

/// One slice of V transposed for each of four products, from 8 columns of the keys in positions 2 t, 2 t + 1, 2 t + 8 and
/// 2 t + 9. `low` and `high`: the factors of the first and the last two.
template <bool kScaled>
__device__ __forceinline__ void value_fragments(Fragment (&a)[4], const uint2 (&x)[4], __half2 low,
                                                __half2 high) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // columns 0-3, 4-7
    const std::uint32_t k0 = half == 0 ? x[0].x : x[0].y, k1 = half == 0 ? x[1].x : x[1].y;
    const std::uint32_t k2 = half == 0 ? x[2].x : x[2].y, k3 = half == 0 ? x[3].x : x[3].y;
#pragma unroll
    for (int j = 0; j < 2;
         ++j) {  // of these the first two columns, the last two: both keys' bytes side by side
      const unsigned selector = j == 0 ? 0x5140 : 0x7362;
      const std::uint32_t first = __byte_perm(k0, k1, selector), last = __byte_perm(k2, k3, selector);
      Fragment& to = a[2 * half + j];
      to[0] = widen2<kScaled, 0>(first, low);
      to[1] = widen2<kScaled, 1>(first, low);
      to[2] = widen2<kScaled, 0>(last, high);
      to[3] = widen2<kScaled, 1>(last, high);
    }
  }
}

/// What a lane needs of the scales of its two keys.
template <bool kScaled>
struct KeyScales {
  int exponent[2] = {0, 0};
  std::uint32_t factor[kScaleTiles / 2][2] = {};  // by pair of tiles and key: two fp16

  /// `first`: where the row of the first key begins; that of the second is `pitch` behind it.
  __device__ __forceinline__ void read(std::uint32_t first, int pitch) {
    if constexpr (kScaled) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto x = ptx::load_shared<float4>(first + h * pitch + RowOf<KvFormat::kFp8V32>::kScaleOffset);
        const float most = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
        exponent[h] = most == 0.0f ? 0 : min(max(exponent_of(most), -64), 64);
        const float inverse = power_of_two(-exponent[h]);
        factor[0][h] = bits_of(__floats2half2_rn(x.x * inverse, x.y * inverse));
        factor[1][h] = bits_of(__floats2half2_rn(x.z * inverse, x.w * inverse));
      }
    }
  }
  /// That of a tile, twice.
  template <int kTile>
  __device__ __forceinline__ __half2 of(int h) const {
    const __half2 two = as_half2(factor[kTile / 2][h]);
    return kTile % 2 == 0 ? __low2half2(two) : __high2half2(two);
  }
  __device__ __forceinline__ __nv_bfloat162 of_rope(int h) const {
    return __float2bfloat162_rn(power_of_two(-exponent[h]));
  }
  __device__ __forceinline__ float power(int h) const { return power_of_two(exponent[h]); }
  __device__ __forceinline__ float inverse(int h) const { return power_of_two(-exponent[h]); }
  /// Lane t of a quad hands on its t-th tile's.
  __device__ __forceinline__ void publish(__half (&to)[kScaleTiles][kTileTokens], int row, int t) const {
    if constexpr (kScaled) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const __half2 two = as_half2(t < 2 ? factor[0][h] : factor[1][h]);
        to[t][row + 8 * h] = t % 2 == 0 ? __low2half(two) : __high2half(two);
      }
    }
  }
};

}  // namespace flash_mla::sm90::dense_fp8
