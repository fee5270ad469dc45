#pragma once

// Combines the partial results of split requests: out = sum_i O_i 2^(m_i - m) / sum_i l_i 2^(m_i - m), with
// m_i the reference and l_i the sum of a row's split i, m the largest m_i.
//
// Grid (row blocks x groups of 16 rows x 2 halves of the columns x column chunks, requests or parts,
// whichever is fewer; with fixed split points, requests). By request, a block looks for the part in which its
// request begins, unless split points are fixed and the slots follow from num_splits; by part, for the split
// request that begins in its part (at most one does). The layout is that of the consumers' registers
// (kFragment): one load of 16 bytes per lane, split and group of 8 columns.
//
// kManySplits (few requests, cut into many splits): a block takes one group of 8 columns, its warps every
// eighth split each, and they meet in shared memory. Otherwise (many requests, cut in two): a warp takes four
// groups of columns of all splits.

#include <cstdint>

#include "sm90/decode/kernel.cuh"

namespace flash_mla::sm90 {

inline constexpr int kCombineWarps = 8;

/// Blocks along x.
template <bool kManySplits>
constexpr int combine_blocks(const RowBlocks& blocks, int h_kv) {
  return blocks.count() * h_kv * row_groups(blocks) * 2 * (kManySplits ? 32 : 1);
}

/// Which slots hold a request's partial results.
struct SplitSlots {
  int splits = 0;  // 0: nothing to combine
  int first = 0, base = 0, step = 0;
  __device__ int at(int i) const { return i == 0 ? first : base + i * step; }
};

__device__ __forceinline__ SplitSlots split_slots(const DecodeParams& p, int& req) {
  SplitSlots slots;
  int owner = static_cast<int>(blockIdx.y);  // the part in which the request begins
  if (p.split_tiles == 0 && p.batch > p.num_parts) {
    const int4 part = part_of(p, owner);
    req = part.y;
    if (part.x >= p.batch || part.x > req || (part.x == req && part.z > 0)) return slots;
  } else {
    req = static_cast<int>(blockIdx.y);
  }
  const int before = p.num_splits[req], splits = p.num_splits[req + 1] - before;
  if (splits <= 1) return slots;
  slots.splits = splits;
  if (p.split_tiles > 0) {
    slots.first = slots.base = before;
    slots.step = 1;
    return slots;
  }
  if (p.batch <= p.num_parts) {
    // The last part that begins at or before the request's first block.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int found = -1;
    for (int i = lane; i < p.num_parts; i += 32) {
      const int4 part = part_of(p, i);
      if (part.x <= req && req <= part.y && (part.x < req || part.z == 0)) found = i;
    }
    owner = __reduce_max_sync(0xFFFFFFFFu, found);
  }
  slots.first = 2 * owner + (part_of(p, owner).x != req ? 1 : 0);
  slots.base = 2 * owner;
  slots.step = 2;
  return slots;
}

/// (m, l) becomes the reference and sum over it and one more split.
__device__ __forceinline__ void add_split(float& m, float& l, float2 split) {
  const float top = fmaxf(m, split.x);
  const float base = top == -INFINITY ? 0.0f : top;  // of NaN scores the sum is NaN, and stays
  l = l * exp2_fast(m - base) + split.y * exp2_fast(split.x - base);
  m = top;
}

template <bool kBf16, bool kManySplits>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const DecodeParams p, int h_kv) {
  constexpr int kColumnChunks = kManySplits ? 32 : 1;
  constexpr int kSteps = kManySplits ? 1 : 32 / kCombineWarps;  // groups of 8 columns per warp
  constexpr int kSplitStep = kManySplits ? kCombineWarps : 1;   // a warp takes every so many-th split
  ptx::grid_dependency_wait();
  int req;
  const SplitSlots slots = split_slots(p, req);
  if (slots.splits == 0) return;

  int x = static_cast<int>(blockIdx.x);
  const int chunk = x % kColumnChunks;
  x /= kColumnChunks;
  const int wg = x % 2;
  x /= 2;
  const int groups = row_groups(p.blocks), group = x % groups;
  const int block = x / groups;  // (latent head, row block)
  const int blocks = p.blocks.count() * h_kv;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  // 16 threads per row walk the statistics: a chain of loads per thread, as short as possible.
  constexpr int kWeightedSplits = 64;
  __shared__ float weights[kWeightedSplits][16];
  constexpr int kBatch = kManySplits ? 4 : 2;
  __shared__ std::uint16_t* out_of_row[16];  // null: padding
  __shared__ float2 rows[16];                // what a row's references are relative to, and 1 / its sum
  const auto* stats = reinterpret_cast<const float2*>(p.partial_stats) + block * kTileRows + group * 16;
  const int stats_stride = blocks * kTileRows;
  {
    constexpr int kThreadsPerRow = kCombineWarps * 32 / 16;
    const int row = static_cast<int>(threadIdx.x) / kThreadsPerRow;
    float m = -INFINITY, l = 0.0f;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % kThreadsPerRow; i < slots.splits; i += kThreadsPerRow) {
      add_split(m, l, stats[slots.at(i) * stats_stride + row]);
    }
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      add_split(m, l,
                float2{__shfl_xor_sync(0xFFFFFFFFu, m, offset), __shfl_xor_sync(0xFFFFFFFFu, l, offset)});
    }
    if (threadIdx.x % kThreadsPerRow == 0) {
      rows[row] = float2{m == -INFINITY ? 0.0f : m, l == 0.0f ? 0.0f : 1.0f / l};
      const int in_block = group * 16 + row, m_block = block % p.blocks.count();
      const int in_group = m_block % p.blocks.head_chunks * kTileRows + in_block % p.blocks.heads;
      const int token = m_block / p.blocks.head_chunks * p.blocks.tokens + in_block / p.blocks.heads;
      const int head = block / p.blocks.count() * p.group + in_group;
      const bool valid = in_block < p.blocks.tokens * p.blocks.heads && token < p.s_q && in_group < p.group;
      out_of_row[row] = valid ? static_cast<std::uint16_t*>(p.out) + req * p.out_stride_b +
                                    token * p.out_stride_s + head * p.out_stride_h
                              : nullptr;
      if (valid && p.lse != nullptr && wg == 0 && chunk == 0) {
        p.lse[req * p.lse_stride_b + head * p.lse_stride_h + token * p.lse_stride_s] =
            l == 0.0f ? INFINITY : (m + log2f(l)) * 0.69314718056f;
      }
    }
  }
  const int low = lane / 4, high = lane / 4 + 8;          // this lane's rows of the group
  const int first = kManySplits ? chunk : warp * kSteps;  // of the groups of 8 columns
  const int first_split = kManySplits ? warp : 0;
  const auto* from = reinterpret_cast<const float4*>(p.partial_out) +
                     static_cast<std::int64_t>((block * groups + group) * 2 + wg) * kFragment + first * 32 +
                     lane;
  // In float4s; 32 bits reach 64 GiB of partial results.
  const auto stride = static_cast<unsigned>(blocks * groups * 2 * kFragment);
  float4 acc[kSteps] = {};
  for (int begin = 0; begin < slots.splits; begin += kWeightedSplits) {
    const int count = min(slots.splits - begin, kWeightedSplits);
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count * 16; i += kCombineWarps * 32) {
      const float2 s = stats[slots.at(begin + i / 16) * stats_stride + i % 16];
      weights[i / 16][i % 16] = s.y == 0.0f ? 0.0f : exp2_fast(s.x - rows[i % 16].x) * rows[i % 16].y;
    }
    __syncthreads();
    for (int begin_batch = first_split; begin_batch < count; begin_batch += kBatch * kSplitStep) {
      // All loads of a batch first: what a warp waits for is one of them, not the sum.
      float4 x[kBatch][kSteps];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int split = begin + min(begin_batch + i * kSplitStep, count - 1);
        const float4* o = from + static_cast<unsigned>(slots.at(split)) * stride;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) x[i][j] = o[j * 32];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int split = begin_batch + i * kSplitStep;
        const float w0 = split < count ? weights[split][low] : 0.0f;
        const float w1 = split < count ? weights[split][high] : 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          // Where the weight is 0 there may be no O: a split without keys writes none.
          acc[j].x += w0 == 0.0f ? 0.0f : w0 * x[i][j].x;
          acc[j].y += w0 == 0.0f ? 0.0f : w0 * x[i][j].y;
          acc[j].z += w1 == 0.0f ? 0.0f : w1 * x[i][j].z;
          acc[j].w += w1 == 0.0f ? 0.0f : w1 * x[i][j].w;
        }
      }
    }
  }

  if constexpr (kManySplits) {
    __shared__ float4 partial[kCombineWarps][32];
    partial[warp][lane] = acc[0];
    __syncthreads();
    if (warp > 0) return;
    acc[0] = float4{};
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) {
      const float4 x = partial[w][lane];
      acc[0].x += x.x;
      acc[0].y += x.y;
      acc[0].z += x.z;
      acc[0].w += x.w;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (out_of_row[low + 8 * h] == nullptr) continue;
    std::uint16_t* to = out_of_row[low + 8 * h] + wg * 256 + first * 8 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      *reinterpret_cast<std::uint32_t*>(to + j * 8) =
          h == 0 ? pack2<kBf16>(acc[j].x, acc[j].y) : pack2<kBf16>(acc[j].z, acc[j].w);
    }
  }
}

}  // namespace flash_mla::sm90
