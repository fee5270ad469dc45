#pragma once

// What kernels do with one row of bfloat16, by the whole block.

#include <cuda_bf16.h>

namespace flash_mla::sm90 {

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

template <int kVec>
struct alignas(kVec * 2) Vector {
  bf16 v[kVec];
};

template <int kVec>
__device__ Vector<kVec> load(const bf16* p) {
  return *reinterpret_cast<const Vector<kVec>*>(p);
}
template <int kVec>
__device__ void store(bf16* p, const Vector<kVec>& v) {
  *reinterpret_cast<Vector<kVec>*>(p) = v;
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

/// Sum over the block, in every thread. All threads call it.
__device__ inline float block_sum(float x) {
  __shared__ float sums[kWarp];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < warps; ++w) total += sums[w];
  __syncthreads();
  return total;
}

/// y = x / sqrt(mean(x²) + eps) * weight for one row, by the whole block.
template <int kVec>
__device__ void norm_row(const bf16* x, const float* weight, float eps, int n, bf16* y) {
  float squares = 0;
  for (int i = threadIdx.x * kVec; i < n; i += blockDim.x * kVec) {
    const Vector<kVec> a = load<kVec>(x + i);
    for (int j = 0; j < kVec; ++j) squares += __bfloat162float(a.v[j]) * __bfloat162float(a.v[j]);
  }
  const float factor = rsqrtf(block_sum(squares) / static_cast<float>(n) + eps);
  for (int i = threadIdx.x * kVec; i < n; i += blockDim.x * kVec) {
    Vector<kVec> a = load<kVec>(x + i);
    for (int j = 0; j < kVec; ++j) {
      a.v[j] = __float2bfloat16(__bfloat162float(a.v[j]) * factor * weight[i + j]);
    }
    store<kVec>(y + i, a);
  }
}

/// Turns one pair.
__device__ inline void rotate(const bf16* from, bf16* to, float cosine, float sine) {
  const float a = __bfloat162float(from[0]), b = __bfloat162float(from[1]);
  to[0] = __float2bfloat16(a * cosine - b * sine);
  to[1] = __float2bfloat16(b * cosine + a * sine);
}

}  // namespace flash_mla::sm90
