#pragma once

// Combines the partial results of split requests: out = sum_i O_i 2^(m_i - m) / sum_i l_i 2^(m_i - m), with
// m_i the reference and l_i the sum of a row's split i, m the largest m_i.
//
// Grid (32 groups of 8 columns / those of a block, or twice as many halves of 8 rows; 2 halves of the columns
// x groups of 16 rows x row blocks x latent heads; requests or parts, whichever is fewer, with fixed split
// points requests). By part, a block takes the split request that begins in its part (at most one does). The
// layout is that of the consumers' registers (kFragment): one load of 16 bytes per lane, split and group of 8
// columns.
//
// Threads    256: 8 warps take groups of columns and splits as CombineShape divides them; 16 threads for the
//            statistics of each of 16 rows.
// Shared     O on its way, 32 to 48 KB in a ring | statistics of 144 splits (the coarsest shape: 48), 18 KB |
//            scales and addresses of the rows. More where blocks have to spread (plan.h).
// Registers  45 to 64, as ptxas gives them.
//
// For a small batch what counts is the time from the last decode block's end to this kernel's end. So a block
// asks for all it needs at once, the blocks spread over all multiprocessors (plan.h), and the code is small:
// fetched from a cold memory it costs about 100 ns per 128 bytes.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/combine_shape.h"
#include "kernels/attention/dense_decode/sm90/work.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90 {

/// n / d, for n and d below 2^16: (n + 1/2) / d is never so near an integer that rounding matters.
__device__ __forceinline__ int divide(int n, float inverse) {
  return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse);
}

template <int kIndex>
struct CombineSmem {
  static constexpr CombineShape kShape = kCombineShapes[kIndex];
  float4 ring[kCombineWarps][ring_splits(kShape)][kShape.warp_groups()][32];  ///< O; a lane reads what it
                                                                              ///< copied itself
  float2 stats[chunk_splits(kShape)][16];  ///< by split and row: reference and sum, then weight and sum
  float scale[16];                         ///< 1 / a row's sum
  std::uint16_t* out_of_row[16];           ///< null: padding
};

/// Where a split's partial results lie, of a request's.
struct Slots {
  int first, next;  ///< of split 0; plus i of split i > 0
  __device__ int of(int i) const { return i == 0 ? first : next + i; }
};

/// What a thread knows of its row: 16 threads have the same. The softmax's reference, what to subtract from
/// the splits' (the same, or 0 if there is none), the sum of their weights.
struct RowState {
  float m = -INFINITY, base = 0.0f, l = 0.0f;
};

/// What the last step needs of a row, from the first of its threads.
struct RowTarget {
  float* lse = nullptr;    // where it goes, if it does
  bool unseen = false;     // the row sees no key
  float sink = -INFINITY;  // base 2
};

/// The steps of a block, in the order in which it takes them. kIndex: of kCombineShapes; nvcc does not take the
/// shape itself. kLists: of sparse decode, which alone has `lists`.
template <bool kBf16, int kIndex, bool kLists>
struct Combine {
  static constexpr CombineShape kShape = kCombineShapes[kIndex];
  static constexpr int kSteps = kShape.warp_groups();  // groups of 8 columns per warp
  static constexpr int kSplitStep = kShape.split_step();
  static constexpr bool kHalves = kShape.lanes < 32;   // the halves of a warp take different splits
  static constexpr int kDepth = ring_splits(kShape);   // splits of it on their way at a time
  static constexpr int kChunk = chunk_splits(kShape);  // splits weighted at a time
  static constexpr int kThreadsPerRow = kCombineWarps * 32 / 16;
  using Smem = CombineSmem<kIndex>;
  using Sums = float4[kSteps];

  // Where row `row` of a group of 16 goes: out to s.out_of_row, by the first of the row's threads.
  __device__ static __forceinline__ RowTarget find_row(const DecodeParams& p, const ListsOfCombine& lists,
                                                       Smem& s, int req, int row_group, int row, int wg) {
    RowTarget target;
    const int block_of_all = divide(row_group, p.groups_inverse);
    const int h_kv = divide(block_of_all, p.count_inverse);
    const int in_block = (row_group - block_of_all * row_groups(p.blocks)) * 16 + row;
    const RowPlace place = place_of(p.blocks, block_of_all - h_kv * p.blocks.count(), in_block);
    const int head = h_kv * p.group + place.head;
    const bool valid =
        in_block < p.blocks.tokens * p.blocks.heads && place.token < p.s_q && place.head < p.group;
    s.out_of_row[row] = valid ? static_cast<std::uint16_t*>(p.out) + req * p.out_stride_b +
                                    place.token * p.out_stride_s + head * p.out_stride_h
                              : nullptr;
    if (valid && p.lse != nullptr && wg == 0 && blockIdx.x == 0) {
      target.lse = p.lse + req * p.lse_stride_b + head * p.lse_stride_h + place.token * p.lse_stride_s;
    }
    if constexpr (kLists) {
      target.unseen = true;
      if (valid && lists.attn_sink != nullptr) target.sink = lists.attn_sink[head] * 1.44269504089f;
    } else {
      const int length = p.cache_seqlens[req];
      target.unseen = (p.causal ? min(length - p.s_q + place.token + 1, length) : length) <= 0;
    }
    return target;
  }

  // All blocks want the same statistics, so they are read by lines: 8 threads for the 16 rows of a split.
  __device__ static __forceinline__ void ask_statistics(Smem& s, const float2* stats, int stride,
                                                        const Slots& slots, int begin, int count) {
    const int rows = static_cast<int>(threadIdx.x) % 8 * 2;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / 8; i < count; i += kCombineWarps * 4) {
      ptx::copy_async_16(&s.stats[i][rows], stats + slots.of(begin + i) * stride + rows);
    }
    ptx::copy_async_commit();
  }

  // A row's reference over all splits, the first `count` of them in shared memory.
  __device__ static __forceinline__ void find_reference(RowState& r, const Smem& s, const float2* stats,
                                                        int stride, const Slots& slots, int splits, int count,
                                                        int row, int of_row) {
#pragma unroll 1
    for (int i = of_row; i < count; i += kThreadsPerRow) r.m = fmaxf(r.m, s.stats[i][row].x);
#pragma unroll 1
    for (int i = kChunk + of_row; i < splits; i += kThreadsPerRow) {
      r.m = fmaxf(r.m, stats[slots.of(i) * stride + row].x);
    }
#pragma unroll 1
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      r.m = fmaxf(r.m, __shfl_xor_sync(0xFFFFFFFFu, r.m, offset));
    }
    if (r.m != -INFINITY) r.base = r.m;
  }

  // References become weights.
  __device__ static __forceinline__ void weigh(RowState& r, Smem& s, int count, int row, int of_row) {
#pragma unroll 1
    for (int i = of_row; i < count; i += kThreadsPerRow) {
      const float2 x = s.stats[i][row];
      const float w = exp2_fast(x.x - r.base);
      r.l += w * x.y;  // of NaN scores the sum is NaN, and stays
      s.stats[i][row].x = x.y == 0.0f ? 0.0f : w;
    }
  }

  // Where the weight is 0 there may be no O: a split without keys writes none.
  __device__ static __forceinline__ void add(Sums& acc, const float4* x, float w0, float w1) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float4 o = x[j * 32];
      if (w0 != 0.0f) {
        acc[j].x += w0 * o.x;
        acc[j].y += w0 * o.y;
      }
      if (w1 != 0.0f) {
        acc[j].z += w1 * o.z;
        acc[j].w += w1 * o.w;
      }
    }
  }

  // A row that saw no key gives 0 and lse = +inf; one whose every score is -inf gives NaN.
  __device__ static __forceinline__ void finish_row(RowState& r, Smem& s, int row, int of_row,
                                                    const RowTarget& target) {
#pragma unroll 1
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      r.l += __shfl_xor_sync(0xFFFFFFFFu, r.l, offset);
    }
    if (of_row == 0) {
      const bool none = r.l == 0.0f;
      const float whole = kLists ? r.l + exp2f(target.sink - r.m) : r.l;
      const bool unseen = kLists ? r.m == -INFINITY : target.unseen;
      s.scale[row] = !none ? 1.0f / whole : unseen ? 0.0f : NAN;
      if (target.lse != nullptr) {
        *target.lse = !none ? (r.m + log2_fast(r.l)) * 0.69314718056f : unseen ? INFINITY : NAN;
      }
    }
  }

  // Adds what the halves of the warp have, and leaves it for the first of the warps that share a group.
  __device__ static __forceinline__ void hand_over(Sums& acc, Smem& s, int warp, int lane) {
    if constexpr (kHalves) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        acc[j].x += __shfl_xor_sync(0xFFFFFFFFu, acc[j].x, 16);
        acc[j].y += __shfl_xor_sync(0xFFFFFFFFu, acc[j].y, 16);
        acc[j].z += __shfl_xor_sync(0xFFFFFFFFu, acc[j].z, 16);
        acc[j].w += __shfl_xor_sync(0xFFFFFFFFu, acc[j].w, 16);
      }
    }
    if constexpr (kShape.split_warps > 1) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) s.ring[warp][0][j][lane] = acc[j];
    }
  }
  __device__ static __forceinline__ void take_over(Sums& acc, const Smem& s, int warp, int lane) {
    if constexpr (kShape.split_warps > 1) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
#pragma unroll 1
        for (int w = 1; w < kShape.split_warps; ++w) {
          const float4 x = s.ring[warp + w][0][j][lane];
          acc[j].x += x.x;
          acc[j].y += x.y;
          acc[j].z += x.z;
          acc[j].w += x.w;
        }
      }
    }
  }

  // `column`: the first of this lane's.
  __device__ static __forceinline__ void store(const Sums& acc, const Smem& s, int low, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (s.out_of_row[low + 8 * h] == nullptr) continue;
      const float factor = s.scale[low + 8 * h];
      std::uint16_t* to = s.out_of_row[low + 8 * h] + column;
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        *reinterpret_cast<std::uint32_t*>(to + j * 8) =
            h == 0 ? pack2<kBf16>(acc[j].x * factor, acc[j].y * factor)
                   : pack2<kBf16>(acc[j].z * factor, acc[j].w * factor);
      }
    }
  }
};

template <bool kBf16, int kIndex, bool kLists>
__global__ void __launch_bounds__(kCombineWarps * 32)
    combine_kernel(const DecodeParams p, const ListsOfCombine lists) {
  using Steps = Combine<kBf16, kIndex, kLists>;
  constexpr CombineShape kShape = Steps::kShape;
  constexpr int kSteps = Steps::kSteps, kSplitStep = Steps::kSplitStep, kDepth = Steps::kDepth,
                kChunk = Steps::kChunk, kThreadsPerRow = Steps::kThreadsPerRow;
  extern __shared__ float4 combine_smem[];
  auto& s = *reinterpret_cast<CombineSmem<kIndex>*>(combine_smem);

  // Up to the wait below nothing depends on the decode kernel, which waited for the schedule before it let
  // this one start.
  const bool uniform = kLists && lists.uniform.blocks > 0;
  int req = static_cast<int>(blockIdx.z), splits = 0;
  if (p.split_tiles == 0 && p.batch > p.num_parts) {
    const PartRange part = uniform ? lists.uniform.part(req, p.batch) : part_of(p, req);
    req = part.begin_req < p.batch &&
                  (part.begin_req < part.end_req || (part.begin_req == part.end_req && part.begin_block == 0))
              ? part.end_req
              : p.batch;
  }
  int first_slot = 0, next_slot = 0;
  if (req < p.batch) {
    const int before = uniform ? lists.uniform.splits_before(req) : p.num_splits[req];
    splits = (uniform ? lists.uniform.splits_before(req + 1) : p.num_splits[req + 1]) - before;
    first_slot = p.split_tiles > 0 ? before : p.num_parts + before - req;
    next_slot = p.split_tiles > 0 ? before : before - req - 1;  // plus i for split i > 0
  }
  const Slots slots{first_slot, next_slot};
  // One block has to wait whatever there is to do, for what comes behind this kernel in the stream waits for
  // this kernel alone. The others need not: where nothing is split that saves 1.3 us.
  if (splits <= 1 && (blockIdx.x | blockIdx.y | blockIdx.z) != 0) return;

  // y: ((latent head, row block), group of 16 rows), half of the columns. 16 threads for each row.
  const int wg = static_cast<int>(blockIdx.y) % 2, row_group = static_cast<int>(blockIdx.y) / 2;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int of_row = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  RowTarget target;
  if (splits > 1 && of_row == 0) target = Steps::find_row(p, lists, s, req, row_group, row, wg);
  ptx::grid_dependency_wait();
  if (splits <= 1) return;

  const int stats_stride = static_cast<int>(gridDim.y) / 2 * 16;
  const auto* stats = reinterpret_cast<const float2*>(p.partial_stats) + row_group * 16;
  // Of the lanes that share 16 rows of a group, the one that this lane is.
  const int of_group = Steps::kHalves ? lane % 16 + static_cast<int>(blockIdx.x) % 2 * 16 : lane;
  const int first_split = warp % kShape.split_warps * (32 / kShape.lanes) + lane / kShape.lanes;
  const int first =
      static_cast<int>(blockIdx.x) * kShape.lanes / 32 * kShape.groups + warp / kShape.split_warps * kSteps;
  const auto* from = reinterpret_cast<const float4*>(p.partial_out) +
                     static_cast<std::int64_t>(blockIdx.y) * kFragment + first * 32 + of_group;
  // In float4s; 32 bits reach kMaxPartialBytes.
  const auto stride = static_cast<unsigned>(gridDim.y * kFragment);
  const int low = of_group / 4;  // this lane's rows are `low` and `low + 8`
  RowState state;
  float4 acc[kSteps] = {};
#pragma unroll 1
  for (int begin = 0; begin < splits; begin += kChunk) {
    const int count = min(splits - begin, kChunk);
    if (begin > 0) __syncthreads();  // the weights have been read
    // All that can be is asked for at once: the statistics, and behind them as much of O as the ring takes.
    Steps::ask_statistics(s, stats, stats_stride, slots, begin, count);
    int next = first_split;
    const auto ask = [&](float4* to) {
      if (next < count) {
        const float4* o = from + static_cast<unsigned>(slots.of(begin + next)) * stride;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) ptx::copy_async_16(to + j * 32, o + j * 32);
      }
      ptx::copy_async_commit();
      next += kSplitStep;
    };
    float4* const ring = &s.ring[warp][0][0][lane];
    float4* const ring_end = ring + kDepth * kSteps * 32;
#pragma unroll 1
    for (float4* to = ring; to != ring_end; to += kSteps * 32) ask(to);
    ptx::copy_async_wait<kDepth>();
    __syncthreads();
    if (begin == 0) {
      Steps::find_reference(state, s, stats, stats_stride, slots, splits, count, row, of_row);
    }
    Steps::weigh(state, s, count, row, of_row);
    __syncthreads();
    float4* x = ring;
#pragma unroll 1
    for (int i = first_split; i < count; i += kSplitStep) {
      ptx::copy_async_wait<kDepth - 1>();
      const float w0 = s.stats[i][low].x, w1 = s.stats[i][low + 8].x;
      Steps::add(acc, x, w0, w1);
      ask(x);
      x += kSteps * 32;
      if (x == ring_end) x = ring;
    }
  }

  Steps::finish_row(state, s, row, of_row, target);
  Steps::hand_over(acc, s, warp, lane);
  __syncthreads();
  if (first_split > 0) return;
  Steps::take_over(acc, s, warp, lane);
  Steps::store(acc, s, low, wg * 256 + first * 8 + lane % 4 * 2);
}

}  // namespace flash_mla::sm90
