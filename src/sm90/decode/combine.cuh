#pragma once

// Combines the partial results of split requests: out = sum_i O_i 2^(lse_i - lse).
//
// Grid (row groups, requests or parts, whichever is fewer; with fixed split points, requests). By request, a
// block looks for the part in which its request begins, unless split points are fixed and the slots follow
// from num_splits; by part, for the split request that begins in its part (at most one does). It combines
// some of that request's rows. kWarpsPerRow warps share a row, each taking every kWarpsPerRow-th split over
// all 512 columns (16 per lane), and meet in shared memory: many warps where few requests are cut into many
// splits, one where many requests are cut in two.

#include <cstdint>

#include "sm90/decode/kernel.cuh"

namespace flash_mla::sm90 {

inline constexpr int kCombineWarps = 8;

template <bool kBf16, int kWarpsPerRow>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const DecodeParams p) {
  constexpr int kRowsPerBlock = kCombineWarps / kWarpsPerRow;
  __shared__ float partial[kWarpsPerRow > 1 ? kCombineWarps : 1][kHeadDimV];
  ptx::grid_dependency_wait();
  __shared__ int owner;  // the part in which the request begins
  int req;
  if (p.split_tiles > 0) {
    req = static_cast<int>(blockIdx.y);
    if (p.num_splits[req + 1] - p.num_splits[req] <= 1) return;
  } else if (p.batch <= p.num_parts) {
    req = static_cast<int>(blockIdx.y);
    if (p.num_splits[req + 1] - p.num_splits[req] <= 1) return;
    for (int i = static_cast<int>(threadIdx.x); i < p.num_parts; i += kCombineWarps * 32) {
      const int4 part = part_of(p, i);
      if (part.x <= req && req <= part.y && (part.x < req || part.z == 0)) owner = i;
    }
    __syncthreads();
  } else {
    const int4 part = part_of(p, static_cast<int>(blockIdx.y));
    req = part.y;
    if (part.x >= p.batch || part.x > req || (part.x == req && part.z > 0)) return;
    if (p.num_splits[req + 1] - p.num_splits[req] <= 1) return;
    if (threadIdx.x == 0) owner = static_cast<int>(blockIdx.y);
    __syncthreads();
  }
  const int splits = p.num_splits[req + 1] - p.num_splits[req];
  const bool fixed = p.split_tiles > 0;
  const int first_slot = fixed ? p.num_splits[req] : 2 * owner + (part_of(p, owner).x != req ? 1 : 0);
  const auto slot_of = [&](int i) { return fixed ? first_slot + i : i == 0 ? first_slot : 2 * (owner + i); };

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int rows = p.s_q * p.h_q;
  const int row = static_cast<int>(blockIdx.x) * kRowsPerBlock + warp / kWarpsPerRow;
  const bool valid = row < rows;
  float acc[16] = {};
  float highest = -INFINITY, sum = 0.0f;
  if (valid) {
    for (int i = lane; i < splits; i += 32) {
      highest = fmaxf(highest, p.partial_lse[static_cast<std::int64_t>(slot_of(i)) * rows + row]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFFu, highest, offset));
    }
    if (highest != -INFINITY) {
      for (int i = lane; i < splits; i += 32) {
        sum += exp2_fast(p.partial_lse[static_cast<std::int64_t>(slot_of(i)) * rows + row] - highest);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
      const float factor = 1.0f / sum;
#pragma unroll 4
      for (int i = warp % kWarpsPerRow; i < splits; i += kWarpsPerRow) {
        const std::int64_t at = static_cast<std::int64_t>(slot_of(i)) * rows + row;
        const float weight = exp2_fast(p.partial_lse[at] - highest) * factor;
        const float4* from = reinterpret_cast<const float4*>(p.partial_out + at * kHeadDimV) + lane;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 x = from[j * 32];
          acc[4 * j] += weight * x.x;
          acc[4 * j + 1] += weight * x.y;
          acc[4 * j + 2] += weight * x.z;
          acc[4 * j + 3] += weight * x.w;
        }
      }
    }
  }
  const int token = row / p.h_q, head = row % p.h_q;
  auto* to = static_cast<std::uint16_t*>(p.out) + req * p.out_stride_b + token * p.out_stride_s +
             head * p.out_stride_h;
  if constexpr (kWarpsPerRow > 1) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      reinterpret_cast<float4*>(partial[warp])[j * 32 + lane] =
          float4{acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
    }
    __syncthreads();
    // Each warp of the row finishes its share of the columns, two per lane and step.
    const int first = warp / kWarpsPerRow * kWarpsPerRow;
    for (int c = (warp - first) * 64 + lane * 2; valid && c < kHeadDimV; c += kWarpsPerRow * 64) {
      float2 x{0.0f, 0.0f};
#pragma unroll
      for (int w = 0; w < kWarpsPerRow; ++w) {
        const float2 y = *reinterpret_cast<const float2*>(&partial[first + w][c]);
        x.x += y.x;
        x.y += y.y;
      }
      *reinterpret_cast<std::uint32_t*>(to + c) = pack2<kBf16>(x.x, x.y);
    }
  } else if (valid) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<uint2*>(to + j * 128 + lane * 4) =
          uint2{pack2<kBf16>(acc[4 * j], acc[4 * j + 1]), pack2<kBf16>(acc[4 * j + 2], acc[4 * j + 3])};
    }
  }
  if (valid && lane == 0 && warp % kWarpsPerRow == 0 && p.lse != nullptr) {
    p.lse[req * p.lse_stride_b + head * p.lse_stride_h + token * p.lse_stride_s] =
        highest == -INFINITY ? INFINITY : (highest + log2f(sum)) * 0.69314718056f;
  }
}

}  // namespace flash_mla::sm90
