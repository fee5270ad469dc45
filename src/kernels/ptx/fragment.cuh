#pragma once

// Small helpers for values in registers that every kernel needs.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_mla::sm90 {

template <bool kBf16>
__device__ __forceinline__ std::uint32_t pack2(float low, float high) {
  if constexpr (kBf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(x);
  } else {
    const __half2 x = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(x);
  }
}

/// Loads four 8 x 8 matrices into a warp; lanes give the addresses of their rows.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&to)[4], std::uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(std::uint32_t (&to)[4], std::uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

/// Stores four 8 x 8 matrices held by a warp; lanes give the addresses of their rows.
__device__ __forceinline__ void stmatrix_x4(std::uint32_t to, std::uint32_t a, std::uint32_t b,
                                            std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void stmatrix_x4_transposed(std::uint32_t to, std::uint32_t a, std::uint32_t b,
                                                       std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Of a softmax's sum: at least 1, and never so large that it loses what counts.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Maximum over a thread's scores of one row: x as a product's result lies in registers, h 0 or 1 for the
/// thread's first or second row.
template <int kScores>
__device__ __forceinline__ float lane_max(const float (&x)[kScores], int h) {
  float best[4];  // several chains: one alone is as long as its latency times its length
#pragma unroll
  for (int i = 0; i < kScores / 4; ++i) {
    const float y = fmaxf(x[4 * i + 2 * h], x[4 * i + 2 * h + 1]);
    best[i % 4] = i < 4 ? y : fmaxf(best[i % 4], y);
  }
  return fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
}

/// Maximum over a quad, whose four lanes hold a quarter of a row's scores each.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

/// Maximum over a row's scores.
template <int kScores>
__device__ __forceinline__ float row_max(const float (&x)[kScores], int h) {
  return quad_max(lane_max(x, h));
}

/// Transposes a 4 x 4 matrix of words held by the four lanes of a quad, one row each.
__device__ __forceinline__ void quad_transpose(std::uint32_t (&x)[4]) {
  const bool b0 = threadIdx.x & 1, b1 = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t t = __shfl_xor_sync(0xFFFFFFFFu, b0 ? x[i] : x[i + 1], 1);
    (b0 ? x[i] : x[i + 1]) = t;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t t = __shfl_xor_sync(0xFFFFFFFFu, b1 ? x[i] : x[i + 2], 2);
    (b1 ? x[i] : x[i + 2]) = t;
  }
}

}  // namespace flash_mla::sm90
