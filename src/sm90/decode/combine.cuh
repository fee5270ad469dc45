#pragma once

// Combines the partial results of split requests: out = sum_i O_i 2^(m_i - m) / sum_i l_i 2^(m_i - m), with
// m_i the reference and l_i the sum of a row's split i, m the largest m_i.
//
// Grid (32 groups of 8 columns / those of a block, 2 halves of the columns x groups of 16 rows x row blocks x
// latent heads, requests or parts, whichever is fewer; with fixed split points, requests). By part, a block
// takes the split request that begins in its part (at most one does). The layout is that of the consumers'
// registers (kFragment): one load of 16 bytes per lane, split and group of 8 columns.
//
// For a small batch what counts is the time from the last decode block's end to this kernel's end, and most
// of that is instructions fetched from a cold memory: about 100 ns per 128 bytes. So the code is small, not
// clever.

#include <cstdint>

#include "sm90/decode/kernel.cuh"

namespace flash_mla::sm90 {

inline constexpr int kCombineWarps = 8;

/// How the eight warps of a block divide 32 groups of 8 columns and a request's splits. Finer shapes have
/// shorter chains of loads and more blocks.
enum class CombineShape {
  kFine,    ///< a block takes one group of columns, a warp every eighth split of it
  kMedium,  ///< four groups; a warp takes two of them and every fourth split
  kCoarse,  ///< all groups; a warp takes four of them and all splits
};
constexpr int split_warps(CombineShape s) {
  return s == CombineShape::kFine ? 8 : s == CombineShape::kMedium ? 4 : 1;
}
constexpr int warp_groups(CombineShape s) {
  return s == CombineShape::kFine ? 1 : s == CombineShape::kMedium ? 2 : 4;
}
constexpr int column_chunks(CombineShape s) { return 32 / (kCombineWarps / split_warps(s) * warp_groups(s)); }

/// (m, l) becomes the reference and sum over it and one more split.
__device__ __forceinline__ void add_split(float& m, float& l, float2 split) {
  const float top = fmaxf(m, split.x);
  const float base = top == -INFINITY ? 0.0f : top;  // of NaN scores the sum is NaN, and stays
  l = l * exp2_fast(m - base) + split.y * exp2_fast(split.x - base);
  m = top;
}

template <bool kBf16, CombineShape kShape>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const DecodeParams p) {
  constexpr int kSteps = warp_groups(kShape);      // groups of 8 columns per warp
  constexpr int kSplitStep = split_warps(kShape);  // a warp takes every so many-th split
  constexpr int kBatch = kSteps == 4 ? 2 : 4;      // splits whose loads are in flight together
  constexpr int kWeightedSplits = 64;
  constexpr int kThreadsPerRow = kCombineWarps * 32 / 16;
  __shared__ float weights[kWeightedSplits][16];
  __shared__ float2 rows[16];                // what a row's references are relative to, and 1 / its sum
  __shared__ std::uint16_t* out_of_row[16];  // null: padding
  __shared__ float4 partial[kCombineWarps][kSteps][32];

  // The decode kernel waited for the schedule before it let this one start.
  int req = static_cast<int>(blockIdx.z), splits = 0;
  if (p.split_tiles == 0 && p.batch > p.num_parts) {
    const int4 part = part_of(p, req);
    req = part.x < p.batch && (part.x < part.y || (part.x == part.y && part.z == 0)) ? part.y : p.batch;
  }
  int first_slot = 0, next_slot = 0;
  if (req < p.batch) {
    const int before = p.num_splits[req];
    splits = p.num_splits[req + 1] - before;
    first_slot = p.split_tiles > 0 ? before : p.num_parts + before - req;
    next_slot = p.split_tiles > 0 ? before : before - req - 1;  // plus i for split i > 0
  }
  const auto slot_of = [&](int i) { return i == 0 ? first_slot : next_slot + i; };
  // One block has to wait whatever there is to do, for what comes behind this kernel in the stream waits for
  // this kernel alone. The others need not: where nothing is split that saves 1.3 us.
  if (splits <= 1 && (blockIdx.x | blockIdx.y | blockIdx.z) != 0) return;
  ptx::grid_dependency_wait();
  if (splits <= 1) return;

  // y: ((latent head, row block), group of 16 rows), half of the columns.
  const int wg = static_cast<int>(blockIdx.y) % 2, groups = row_groups(p.blocks);
  const int row_group = static_cast<int>(blockIdx.y) / 2;  // over all blocks
  const int all_groups = static_cast<int>(gridDim.y) / 2;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const auto* stats = reinterpret_cast<const float2*>(p.partial_stats) + row_group * 16;
  const int stats_stride = all_groups * 16;
  {
    // 16 threads per row walk the statistics: a chain of loads per thread, as short as possible.
    const int row = static_cast<int>(threadIdx.x) / kThreadsPerRow;
    float m = -INFINITY, l = 0.0f;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % kThreadsPerRow; i < splits; i += kThreadsPerRow) {
      add_split(m, l, stats[slot_of(i) * stats_stride + row]);
    }
#pragma unroll 1
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      add_split(m, l,
                float2{__shfl_xor_sync(0xFFFFFFFFu, m, offset), __shfl_xor_sync(0xFFFFFFFFu, l, offset)});
    }
    if (threadIdx.x % kThreadsPerRow == 0) {
      const int block_of_all = row_group / groups, in_block = row_group % groups * 16 + row;
      const int h_kv = block_of_all / p.blocks.count();
      const RowPlace place = place_of(p.blocks, block_of_all % p.blocks.count(), in_block);
      const int head = h_kv * p.group + place.head;
      // A row that saw no key gives 0 and lse = +inf; one whose every score is -inf gives NaN.
      const int length = p.cache_seqlens[req];
      const bool none = l == 0.0f;
      const bool unseen = none && (p.causal ? min(length - p.s_q + place.token + 1, length) : length) <= 0;
      rows[row] = float2{m == -INFINITY ? 0.0f : m, unseen ? 0.0f : none ? NAN : 1.0f / l};
      const bool valid =
          in_block < p.blocks.tokens * p.blocks.heads && place.token < p.s_q && place.head < p.group;
      out_of_row[row] = valid ? static_cast<std::uint16_t*>(p.out) + req * p.out_stride_b +
                                    place.token * p.out_stride_s + head * p.out_stride_h
                              : nullptr;
      if (valid && p.lse != nullptr && wg == 0 && blockIdx.x == 0) {
        p.lse[req * p.lse_stride_b + head * p.lse_stride_h + place.token * p.lse_stride_s] =
            unseen ? INFINITY
            : none ? NAN
                   : (m + log2f(l)) * 0.69314718056f;
      }
    }
  }

  const int first_split = warp % kSplitStep;
  const int first =
      (static_cast<int>(blockIdx.x) * (kCombineWarps / kSplitStep) + warp / kSplitStep) * kSteps;
  const auto* from = reinterpret_cast<const float4*>(p.partial_out) +
                     static_cast<std::int64_t>(blockIdx.y) * kFragment + first * 32 + lane;
  // In float4s; 32 bits reach 64 GiB of partial results.
  const auto stride = static_cast<unsigned>(gridDim.y * kFragment);
  const int low = lane / 4;  // this lane's rows are `low` and `low + 8`
  float4 acc[kSteps] = {};
#pragma unroll 1
  for (int begin = 0; begin < splits; begin += kWeightedSplits) {
    const int count = min(splits - begin, kWeightedSplits);
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kWeightedSplits * 16; i += kCombineWarps * 32) {
      float w = 0.0f * rows[i % 16].y;  // of a split that saw nothing: 0, or NaN where the row's result is
      if (i < count * 16) {
        const float2 s = stats[slot_of(begin + i / 16) * stats_stride + i % 16];
        if (s.y != 0.0f) w = exp2_fast(s.x - rows[i % 16].x) * rows[i % 16].y;
      }
      weights[i / 16][i % 16] = w;
    }
    __syncthreads();
#pragma unroll 1
    for (int batch = first_split; batch < count; batch += kBatch * kSplitStep) {
      // All loads of a batch first: what a warp waits for is one of them, not the sum. Behind the last split
      // follow ones of weight 0.
      float4 x[kBatch][kSteps];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4* o =
            from + static_cast<unsigned>(slot_of(min(begin + batch + i * kSplitStep, splits - 1))) * stride;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) x[i][j] = o[j * 32];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int split = min(batch + i * kSplitStep, kWeightedSplits - 1);
        const bool more = batch + i * kSplitStep < kWeightedSplits;
        const float w0 = more ? weights[split][low] : 0.0f, w1 = more ? weights[split][low + 8] : 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          // Where the weight is 0 there may be no O: a split without keys writes none.
          if (w0 != 0.0f) {
            acc[j].x += w0 * x[i][j].x;
            acc[j].y += w0 * x[i][j].y;
          }
          if (w1 != 0.0f) {
            acc[j].z += w1 * x[i][j].z;
            acc[j].w += w1 * x[i][j].w;
          }
        }
      }
    }
  }

  if constexpr (kSplitStep > 1) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) partial[warp][j][lane] = acc[j];
    __syncthreads();
    if (first_split > 0) return;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
#pragma unroll 1
      for (int w = 1; w < kSplitStep; ++w) {
        const float4 x = partial[warp + w][j][lane];
        acc[j].x += x.x;
        acc[j].y += x.y;
        acc[j].z += x.z;
        acc[j].w += x.w;
      }
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
