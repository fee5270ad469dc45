#pragma once

// The sums of the weight stream (weight_stream.cuh): the products of a stage, and how warps and CTAs add up
// theirs.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/gemm/sm90/widen_e4m3.cuh"
#include "kernels/gemm/sm90/widen_int4.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"

namespace flash_mla::sm90 {

/// A thread's place in the CTA.
template <class Shape>
struct StreamThread {
  int lane, warp_n, warp_k;  ///< the warp's place along n, and its k group
  int quad_row, quad;        ///< in the fragments of a product

  __device__ __forceinline__ StreamThread() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    warp_n = warp % Shape::kWarpsN, warp_k = warp / Shape::kWarpsN;
    quad_row = lane / 4, quad = lane % 4;
  }
};

/// The sums of a warp: 16 rows of W by 8 of x for each tile and group.
template <class Shape>
using StreamSums = float[Shape::kTiles][Shape::kGroups][4];

/// The warp's sums to their places in a plane of shared memory.
template <class Shape>
__device__ __forceinline__ void place_sums(const StreamThread<Shape>& thread, const StreamSums<Shape>& sums,
                                           float* plane, bool add) {
  constexpr int kStride = Shape::kSumStride;
  // Rows r and r + 8 of a product are rows that far apart; of int4 weights neighbours.
  constexpr int kApart = Shape::kInt4 ? 1 : 8, kRow = Shape::kInt4 ? 2 : 1;
#pragma unroll
  for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < Shape::kGroups; ++i) {
      float* to = plane + (i * 8 + thread.quad * 2) * kStride + (thread.warp_n * Shape::kTiles + t) * 16 +
                  thread.quad_row * kRow;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& at = to[(c % 2) * kStride + c / 2 * kApart];
        at = add ? at + sums[t][i][c] : sums[t][i][c];
      }
    }
  }
}

/// The k groups' sums, one after the other, to the first plane: through planes of their own where those are
/// small, else in turn. `count`: rows of x.
template <class Shape>
__device__ __forceinline__ void add_up(const StreamThread<Shape>& thread, const StreamSums<Shape>& sums,
                                       float* partial, int count) {
  constexpr int kWarpsK = Shape::kWarpsK, kRows = Shape::kRows;
  if constexpr (Shape::kPlanes > 1) {
    place_sums(thread, sums, partial + thread.warp_k * Shape::kPlane, false);
    __syncthreads();
    for (int i = threadIdx.x; i < count * (kRows / 4); i += Shape::kThreads) {
      float* at = partial + (i / (kRows / 4)) * Shape::kSumStride + i % (kRows / 4) * 4;
      float4 sum = *reinterpret_cast<float4*>(at);
#pragma unroll
      for (int w = 1; w < kWarpsK; ++w) {
        const float4 v = *reinterpret_cast<float4*>(at + w * Shape::kPlane);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      *reinterpret_cast<float4*>(at) = sum;
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWarpsK; ++w) {
      if (thread.warp_k == w) place_sums(thread, sums, partial, w > 0);
      if (w + 1 < kWarpsK) __syncthreads();
    }
  }
}

/// Of all threads that share an item: what they wrote before is there for all of them.
__device__ __forceinline__ void sync_cluster(int cluster) {
  if (cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}
/// The same where they have only read: no store has to be waited for.
__device__ __forceinline__ void sync_cluster_readers(int cluster) {
  if (cluster > 1) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}

/// Four neighbouring sums of the CTA, or of the cluster's CTAs in order of rank.
__device__ __forceinline__ float4 total_of(float* at, const int& cluster) {
  if (cluster == 1) return *reinterpret_cast<float4*>(at);
  float4 sum = ptx::load_cluster_16(ptx::smem_address(at), 0);
  for (int r = 1; r < cluster; ++r) {
    const float4 v = ptx::load_cluster_16(ptx::smem_address(at), r);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

/// sums += a tile of 16 rows of W by 32 columns of k, times x; lo and hi: its upper and its lower 8 rows.
template <int kGroups>
__device__ __forceinline__ void multiply_tile(const uint4& lo, const uint4& hi, const uint4 (&b)[kGroups],
                                              float (&sums)[kGroups][4]) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    ptx::mma_m16n8k16_bf16(sums[i], lo.x, hi.x, lo.y, hi.y, b[i].x, b[i].y);
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    ptx::mma_m16n8k16_bf16(sums[i], lo.z, hi.z, lo.w, hi.w, b[i].z, b[i].w);
  }
}

/// sums += a tile of 16 rows of W by 32 columns of k in e4m3, times x; the upper 8 rows by `upper`, the lower by `lower`.
template <int kGroups>
__device__ __forceinline__ void multiply_tile(uint2 lo, uint2 hi, const uint4 (&b)[kGroups], float upper,
                                              float lower, float (&sums)[kGroups][4]) {
  float part[kGroups][4] = {};
  const uint2 l0 = expand_e4m3(lo.x), l1 = expand_e4m3(lo.y);
  const uint2 h0 = expand_e4m3(hi.x), h1 = expand_e4m3(hi.y);
  multiply_tile(make_uint4(l0.x, l0.y, l1.x, l1.y), make_uint4(h0.x, h0.y, h1.x, h1.y), b, part);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    sums[i][0] += upper * part[i][0], sums[i][1] += upper * part[i][1];
    sums[i][2] += lower * part[i][2], sums[i][3] += lower * part[i][3];
  }
}

/// The same in int4: `codes` of a row and of the one below it, by `scales` of the two.
template <int kGroups>
__device__ __forceinline__ void multiply_int4_tile(uint2 codes, const uint4 (&b)[kGroups], float2 scales,
                                                   float (&sums)[kGroups][4]) {
  float part[kGroups][4] = {};
  multiply_tile(expand_int4(codes.x), expand_int4(codes.y), b, part);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    sums[i][0] += scales.x * part[i][0], sums[i][1] += scales.x * part[i][1];
    sums[i][2] += scales.y * part[i][2], sums[i][3] += scales.y * part[i][3];
  }
}

/// The same of float32 weights, the smallest parts first.
template <int kGroups>
__device__ __forceinline__ void multiply_tile(const uint4 (&low)[3], const uint4 (&high)[3],
                                              const uint4 (&b)[kGroups], float (&sums)[kGroups][4]) {
#pragma unroll
  for (int part = 2; part >= 0; --part) {
    const uint4 lo = low[part], hi = high[part];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      ptx::mma_m16n8k16_bf16(sums[i], lo.x, hi.x, lo.y, hi.y, b[i].x, b[i].y);
      ptx::mma_m16n8k16_bf16(sums[i], lo.z, hi.z, lo.w, hi.w, b[i].z, b[i].w);
    }
  }
}

}  // namespace flash_mla::sm90
