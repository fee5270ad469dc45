#pragma once

// out^T = weight · x^T in W4A8, W4A16 or W8A16, for narrow_gemm.h.
//
// Tile:      256 rows of W (kSilu: 128 gate rows and the up rows of the same outputs) times up to kRows = 16 to 128 rows of
//            x, 128 columns of k a stage.
// Threads:   warpgroups 0 and 1 multiply, each two blocks of 64 rows of W (wgmma m64nNk32): the weights are A, in registers, x
//            is B. What 128 columns of k give is multiplied by its scales and added in registers. Warpgroup 2 copies: one
//            thread asks the copy engine for boxes of weights, all gather rows of x.
// Memory:    5 to 10 stages of weights (16 KB), x (2 to 16 KB) and scales: 208 KB.
// Registers: 224 for warpgroups that multiply (64 to 128 sums, 64 of a stage), 56 for the one that copies.
//
// Codes:     W4A8: a code of 0 to 15 is as e4m3 itself times 2^-9 (subnormal below 8): to expand eight of them takes a shift and two
//            masks. Their zero is 8, so that x's sum times 8 is taken off where products are scaled; the 2^9 is in x's scale.
//            W4A16, W8A16: eight codes become bfloat16 exactly in 12 operations (widen_int4.cuh) or 20 (widen_e4m3.cuh).
// Order:     16 bytes of int4 weights are 16 columns of rows 2 r and 2 r + 1 (int4_weights.h), which are rows r and r + 8 of a
//            warp's 16; of e4m3 weights two neighbours are made such rows too (row_of). Thread t of a quad takes columns 32 t to 32 t + 31, eight for each of four products (bfloat16: four for
//            each of eight); x lies so that these are the columns which wgmma gives that thread: e4m3 is stored so
//            (int4_order), bfloat16 is copied so, two columns at a time.
//
// CTAs take tiles in turn; copies run ahead across them.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/gemm/sm90/narrow_gemm_results.cuh"
#include "kernels/gemm/sm90/narrow_gemm_tiles.cuh"
#include "kernels/gemm/sm90/widen_e4m3.cuh"
#include "kernels/gemm/sm90/widen_int4.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma_e4m3_wide.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::narrow {

// ---- Copies

/// A tile's weights and their scales, as two pairs of blocks. Two warps ask for them: one would be what all wait for.
template <class C>
struct WeightCopies {
  const Params& p;
  Block pairs[2];
  int expert;
  const float* scales;  // of the next step

  __device__ explicit WeightCopies(const Params& params) : p(params) {}

  __device__ void begin(const Tile& tile) {
    pairs[0] = pair_of<C>(p, tile, 0);
    pairs[1] = pair_of<C>(p, tile, 1);
    expert = tile.unit.expert;
    scales = p.gemm.weight_scales + std::int64_t{expert} * p.steps * p.gemm.n;
  }
  __device__ void copy_weights(Shared<C>& s, int slot, int step) const {
    ptx::mbarrier_arrive_expect_tx(&s.full[slot], 4 * C::kBlockBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::tma_load_5d(s.weights[slot][2 * i], &p.weight_map, &s.full[slot], step * (kStepK / 2),
                       C::kE4m3 ? pairs[i].row : pairs[i].row / 2, expert, 0, 0);
    }
  }
  /// In order of the steps. e4m3 has none: its scales are read by those who multiply.
  __device__ void copy_scales(Shared<C>& s, int slot) {
    if constexpr (!C::kE4m3) {
      ptx::mbarrier_arrive_expect_tx(&s.full[slot],
                                     static_cast<std::uint32_t>(pairs[0].count + pairs[1].count) * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (pairs[i].count > 0) {
          ptx::bulk_load(s.weight_scales[slot][2 * i], scales + pairs[i].row,
                         static_cast<std::uint32_t>(pairs[i].count) * 4, &s.full[slot]);
        }
      }
      scales += p.gemm.n;
    }
  }
};

/// Which row of x is a tile's `row`; -1: none.
__device__ __forceinline__ int source_of(const NarrowGemm& g, const Tile& tile, int row) {
  if (row >= tile.unit.count) return -1;
  const int position = tile.unit.first + row;
  return g.gather && g.pairs != nullptr ? __ldcg(g.pairs + position) / g.x_divisor : position;
}

/// A warpgroup's copies of a tile's x: codes and scales, thread t of piece t % 8 of rows t / 8 + 16 i, and scales of row t.
template <class C>
struct CodeCopies {
  static constexpr int kRowsPerPass = kWarpgroup / 8, kPasses = C::kRows / kRowsPerPass;
  const Params& p;
  int thread, first_row, piece;
  int rows[kPasses], own;

  __device__ CodeCopies(const Params& params, int thread_of_group)
      : p(params), thread(thread_of_group), first_row(thread / 8), piece(thread % 8) {}

  __device__ void begin(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows[i] = source_of(p.gemm, tile, first_row + i * kRowsPerPass);
    own = thread < C::kRows ? source_of(p.gemm, tile, thread) : -1;
  }
  __device__ void copy(Shared<C>& s, int slot, int step) const {
    const NarrowGemm& g = p.gemm;
    const std::uint32_t to =
        ptx::smem_address(s.x[slot]) +
        static_cast<std::uint32_t>(first_row * kStepK + ((piece ^ (first_row % 8)) * 16));
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool here = rows[i] >= 0;
      const auto* const from = static_cast<const std::uint8_t*>(g.x) +
                               (here ? (std::int64_t{rows[i]} * p.steps + step) * kStepK + piece * 16 : 0);
      ptx::cp_async_16(to + static_cast<std::uint32_t>(i * kRowsPerPass * kStepK), from, here ? 16 : 0);
    }
    if (thread < C::kRows) {
      const std::int64_t at = own >= 0 ? std::int64_t{own} * p.steps + step : 0;
      ptx::cp_async_4(ptx::smem_address(&s.x_scales[slot][thread]), g.x_scales + at, own >= 0 ? 4 : 0);
      ptx::cp_async_4(ptx::smem_address(&s.x_offsets[slot][thread]), g.x_offsets + at, own >= 0 ? 4 : 0);
    }
  }
};

/// The same of bfloat16: thread t copies eight columns, t % 16, of rows t / 16 + 8 i. They are of one thread of every quad, two for
/// each half of two products.
template <class C>
struct Bf16Copies {
  static constexpr int kRowsPerPass = kWarpgroup / 16, kPasses = C::kRows / kRowsPerPass;
  const Params& p;
  int first_row, piece;
  int rows[kPasses];

  __device__ Bf16Copies(const Params& params, int thread)
      : p(params), first_row(thread / 16), piece(thread % 16) {}

  __device__ void begin(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows[i] = source_of(p.gemm, tile, first_row + i * kRowsPerPass);
  }
  __device__ void copy(Shared<C>& s, int slot, int step) const {
    // int4: a thread has four pieces in a row; e4m3: the two of a 16 bytes of the first half of the columns and of the second.
    const int quad = C::kE4m3 ? piece % 8 / 2 : piece / 4;
    const int word = C::kE4m3 ? piece / 8 * 2 + piece % 2 : piece % 4;
    const std::int64_t column = step * kStepK + piece * 8;
    const std::uint32_t to =
        ptx::smem_address(s.x[slot]) +
        static_cast<std::uint32_t>(word / 2 * C::kRows * 128 + first_row * 128 + quad * 4);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool here = rows[i] >= 0 && column < p.gemm.k;
      const auto* const from =
          static_cast<const __nv_bfloat16*>(p.gemm.x) + (here ? rows[i] * p.gemm.x_stride + column : 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int unit = (word % 2 * 4 + j) ^ first_row;  // of 16 bytes; rows are 8 apart
        ptx::cp_async_4(to + static_cast<std::uint32_t>(i * kRowsPerPass * 128 + unit * 16), from + 2 * j,
                        here ? 4 : 0);
      }
    }
  }
};

/// A warpgroup.
template <class C>
__device__ __forceinline__ void copy(const Params& p, Shared<C>& s) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  std::conditional_t<C::kBf16, Bf16Copies<C>, CodeCopies<C>> x(p, thread);
  WeightCopies<C> weights(p);
  const bool is_first = thread < 32 && ptx::elect_one(), is_second = thread / 32 == 1 && ptx::elect_one();
  Ring<C> ring;
  for (Walk<C> walk(p); !walk.done(); walk.next()) {
    const Tile tile = walk.tile();
    x.begin(tile);
    weights.begin(tile);
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      ptx::mbarrier_wait(&s.empty[ring.slot], (ring.round & 1) ^ 1);
      if (is_first) weights.copy_weights(s, ring.slot, step);
      if (is_second) weights.copy_scales(s, ring.slot);
      x.copy(s, ring.slot, step);
      ptx::cp_async_arrive(&s.full[ring.slot]);
    }
  }
}

// ---- Products

/// 16 bytes of a box.
__device__ __forceinline__ uint4 piece_of(std::uint32_t box, int row, int piece) {
  return ptx::load_shared<uint4>(box + static_cast<std::uint32_t>(row * kStepK + ((piece ^ (row % 8)) * 16)));
}

/// Of eight columns of a product's rows r and r + 8 two products' A, in bfloat16.
__device__ __forceinline__ void place(std::uint32_t (&first)[4], std::uint32_t (&second)[4],
                                      const uint4& upper, const uint4& lower) {
  first[0] = upper.x, first[1] = lower.x, first[2] = upper.y, first[3] = lower.y;
  second[0] = upper.z, second[1] = lower.z, second[2] = upper.w, second[3] = lower.w;
}
__device__ __forceinline__ uint4 expand_e4m3_8(std::uint32_t low, std::uint32_t high) {
  const uint2 a = expand_e4m3(low), b = expand_e4m3(high);
  return make_uint4(a.x, a.y, b.x, b.y);
}

/// A thread's share of a block of 64 rows and 128 columns, as A of the block's products. `box`: in shared memory.
template <class C, int kProducts>
__device__ __forceinline__ void expand(std::uint32_t box, int warp, int lane,
                                       std::uint32_t (&a)[kProducts][4]) {
  constexpr std::uint32_t kCodes = 0x0F0F0F0F;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (C::kE4m3) {
      const int row = warp * 16 + row_of<C>(lane), piece = lane % 4 + 4 * half;
      const uint4 upper = piece_of(box, row, piece), lower = piece_of(box, row + 1, piece);
      place(a[4 * half], a[4 * half + 1], expand_e4m3_8(upper.x, upper.y), expand_e4m3_8(lower.x, lower.y));
      place(a[4 * half + 2], a[4 * half + 3], expand_e4m3_8(upper.z, upper.w),
            expand_e4m3_8(lower.z, lower.w));
    } else {
      // x and z: eight columns each of the first row, y and w: of the second.
      const uint4 words = piece_of(box, warp * 8 + lane / 4, lane % 4 * 2 + half);
      const std::uint32_t of[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (C::kBf16) {
          place(a[4 * half + 2 * i], a[4 * half + 2 * i + 1], expand_int4(of[i][0]), expand_int4(of[i][1]));
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[2 * half + i][j] = of[i][j % 2] >> (j / 2 * 4) & kCodes;
        }
      }
    }
  }
}

/// part = a block of weights times the stage's rows of x. Queued.
template <class C>
__device__ __forceinline__ void multiply(float (&part)[C::kSums], std::uint32_t box, std::uint64_t x,
                                         int warp, int lane) {
  constexpr int kProducts = C::kBf16 ? 8 : 4;
  std::uint32_t a[kProducts][4];
  expand<C>(box, warp, lane, a);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    if constexpr (C::kBf16) {
      const std::uint32_t at = i / 4 * (C::kRows * 128 / 16) + i % 4 * 2;
      ptx::wgmma_rs<true, false>(part, a[i], ptx::advance(x, at), i > 0);
    } else {
      ptx::wgmma_e4m3(part, a[i], ptx::advance(x, static_cast<std::uint32_t>(2 * i)), i > 0);
    }
  }
  ptx::wgmma_commit();
}

/// A thread's scales of a stage. Of x, W4A8: of its two rows of every 8, and their offsets.
template <class C>
struct StageScales {
  static constexpr int kOfX = C::kBf16 ? 1 : C::kGroups;
  float2 weight[2];  // of both blocks, its two rows of W
  float2 x[kOfX], offset[kOfX];

  /// By instructions that stay where they are: the compiler puts ordinary loads behind the wait for products.
  __device__ __forceinline__ void read_weight(const Shared<C>& s, int slot, int group, int warp, int lane) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      weight[block] = ptx::load_shared<float2>(
          ptx::smem_address(&s.weight_scales[slot][place_of<C>(group, block)][warp * 16 + row_of<C>(lane)]));
    }
  }
  __device__ __forceinline__ void read_x(const Shared<C>& s, int slot, int lane) {
    constexpr float kOfCodes = 512.0f;
    if constexpr (!C::kBf16) {
#pragma unroll
      for (int j = 0; j < C::kGroups; ++j) {
        x[j] = ptx::load_shared<float2>(ptx::smem_address(&s.x_scales[slot][8 * j + lane % 4 * 2]));
        offset[j] = ptx::load_shared<float2>(ptx::smem_address(&s.x_offsets[slot][8 * j + lane % 4 * 2]));
        x[j].x *= kOfCodes;
        x[j].y *= kOfCodes;
      }
    }
  }
};

/// sums += part times its scales. A thread has rows lane / 4 and lane / 4 + 8 of its warp's 16, which are two neighbours of W,
/// and of every 8 rows of x the two from lane % 4 * 2 on.
template <class C>
__device__ __forceinline__ void promote(float (&sums)[C::kSums], const float (&part)[C::kSums],
                                        const StageScales<C>& scales, int block) {
  const float2 weight = scales.weight[block];
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = part[4 * j + i];
      if constexpr (!C::kBf16) {
        value = i % 2 == 0 ? fmaf(value, scales.x[j].x, -scales.offset[j].x)
                           : fmaf(value, scales.x[j].y, -scales.offset[j].y);
      }
      sums[4 * j + i] = fmaf(value, i < 2 ? weight.x : weight.y, sums[4 * j + i]);
    }
  }
}

/// The scale of a thread's two rows of each of its blocks, of e4m3 weights: read from memory, a stage ahead.
template <class C>
struct BlockScales {
  const float* of_block[2];

  __device__ BlockScales(const Params& p, const Tile& tile, int group, int warp, int lane) {
    const std::int64_t scale_rows = (p.gemm.n + 7) / 8;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int row = block_of<C>(p, tile, group, block).row + warp * 16 + row_of<C>(lane);
      const std::int64_t scale_row = min(std::int64_t{row / 8}, scale_rows - 1);
      of_block[block] = p.gemm.weight_scales + (tile.unit.expert * scale_rows + scale_row) * p.steps;
    }
  }
  __device__ __forceinline__ float2 read(int step) const {
    return make_float2(__ldg(of_block[0] + step), __ldg(of_block[1] + step));
  }
};

template <class C>
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared<C>& s) {
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kWarpgroup, warp = thread % kWarpgroup / 32, lane = thread % 32;
  Ring<C> ring;
  int parity = 0;
  for (Walk<C> walk(p); !walk.done(); walk.next(), parity ^= 1) {
    const Tile tile = walk.tile();
    float sums[2][C::kSums];
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sums[0][i] = sums[1][i] = 0.0f;
    const BlockScales<C> reader(p, tile, group, warp, lane);
    float2 next{};
    if constexpr (C::kE4m3) next = reader.read(0);
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      const int slot = ring.slot;
      ptx::mbarrier_wait(&s.full[slot], ring.round & 1);
      ptx::fence_async_proxy();  // rows of x came by cp.async; wgmma reads through the other proxy
      const float2 of_blocks = next;
      if constexpr (C::kE4m3) {
        if (step + 1 < p.steps) next = reader.read(step + 1);  // behind the fence, which would wait for it
      }
      const std::uint64_t x = ptx::swizzled_descriptor(s.x[slot], 0, 8 * kStepK);
      const auto multiply_block = [&](float(&part)[C::kSums], int block) {
        multiply<C>(part, ptx::smem_address(s.weights[slot][place_of<C>(group, block)]), x, warp, lane);
      };
      StageScales<C> scales;
      if constexpr (C::kE4m3) {
        scales.weight[0] = make_float2(of_blocks.x, of_blocks.x);
        scales.weight[1] = make_float2(of_blocks.y, of_blocks.y);
      } else {
        scales.read_weight(s, slot, group, warp, lane);
      }
      if constexpr (C::kRows <= 64) {
        scales.read_x(s, slot, lane);
        float part[2][C::kSums];
        multiply_block(part[0], 0);
        multiply_block(part[1], 1);
        ptx::wgmma_wait<1>();
        promote<C>(sums[0], part[0], scales, 0);
        ptx::wgmma_wait<0>();
        promote<C>(sums[1], part[1], scales, 1);
      } else {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          float part[C::kSums];
          multiply_block(part, block);
          ptx::wgmma_wait<0>();
          scales.read_x(s, slot, lane);  // there are no registers to have them before
          promote<C>(sums[block], part, scales, block);
        }
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.empty[slot]);
    }
    if constexpr (C::kSilu && C::kBf16) {
      store_activated<C>(p, tile, sums, group, warp, lane);
    } else if constexpr (C::kSilu) {
      store_quantised<C>(p, s, tile, sums, parity, group, warp, lane);
    } else {
      store<C>(p, tile, sums, group, warp, lane);
    }
  }
}

template <class C>
__global__ __launch_bounds__(kThreads, 1) void narrow_gemm_kernel(const __grid_constant__ Params p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s =
      *reinterpret_cast<Shared<C>*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      // Every thread for its copies, one for the weights, one for their scales.
      ptx::mbarrier_init(&s.full[i], kWarpgroup + (C::kE4m3 ? 1 : 2));
      ptx::mbarrier_init(&s.empty[i], kWarps);
    }
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&p.weight_map);
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::set_max_registers_up<224>();
    multiply_tiles<C>(p, s);
  } else {
    ptx::set_max_registers_down<56>();
    copy<C>(p, s);
  }
}

}  // namespace flash_mla::sm90::narrow
