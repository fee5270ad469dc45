#pragma once

// out^T = weight · x^T in W4A8 or W4A16, for int4_gemm.h.
//
// Tile:      256 rows of W (kSilu: 128 gate rows and the up rows of the same outputs) times up to kRows = 16 to 128 rows of
//            x, 128 columns of k a stage.
// Threads:   warpgroups 0 and 1 multiply, each two blocks of 64 rows of W (wgmma m64nNk32): the weights are A, in registers, x
//            is B. What 128 columns of k give is multiplied by its scales and added in registers. Warpgroup 2 copies: one
//            thread asks the copy engine for boxes of weights, all gather rows of x.
// Memory:    5 to 10 stages of weights (16 KB), x (2 to 16 KB) and scales: 208 KB.
// Registers: 232 for warpgroups that multiply (64 to 128 sums, 64 of a stage), 40 for the one that copies.
//
// Codes:     W4A8: a code of 0 to 15 is as e4m3 itself times 2^-9 (subnormal below 8): to expand eight of them takes a shift and two
//            masks. Their zero is 8, so that x's sum times 8 is taken off where products are scaled; the 2^9 is in x's scale.
//            W4A16: eight codes become bfloat16 exactly in twelve operations (widen_int4.cuh).
// Order:     16 bytes of weights are 16 columns of rows 2 r and 2 r + 1 (int4_weights.h), which are rows r and r + 8 of a
//            warp's 16. Thread t of a quad takes columns 32 t to 32 t + 31, eight for each of four products (bfloat16: four for
//            each of eight); x lies so that these are the columns which wgmma gives that thread: e4m3 is stored so
//            (int4_order), bfloat16 is copied so, two columns at a time.
//
// CTAs take tiles in turn; copies run ahead across them.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/gemm/sm90/int4_gemm_results.cuh"
#include "kernels/gemm/sm90/int4_gemm_tiles.cuh"
#include "kernels/gemm/sm90/widen_int4.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma_e4m3_wide.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::int4 {

// ---- Copies

/// Asks for a stage's weights and their scales.
template <class C>
__device__ __forceinline__ void load_weights(const Params& p, Shared<C>& s, int slot, const Tile& tile,
                                             int step) {
  std::uint64_t* const full = &s.full[slot];
  Block blocks[4];
  std::uint32_t bytes = kWeightBytes;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    blocks[i] = block_of<C>(p, tile, i / 2, i % 2);
    bytes += static_cast<std::uint32_t>(blocks[i].count) * 4;
  }
  ptx::mbarrier_arrive_expect_tx(full, bytes);
  const float* const scales =
      p.gemm.weight_scales + (std::int64_t{tile.unit.expert} * p.steps + step) * p.gemm.n;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Block& block = blocks[i];
    ptx::tma_load_5d(s.weights[slot][i], &p.weight_map, full, step * (kStepK / 2), block.row / 2,
                     tile.unit.expert, 0, 0);
    if (block.count > 0) {
      ptx::bulk_load(s.weight_scales[slot][i], scales + block.row,
                     static_cast<std::uint32_t>(block.count) * 4, full);
    }
  }
}

/// Which row of x is a tile's `row`; -1: none.
__device__ __forceinline__ int source_of(const Int4Gemm& g, const Tile& tile, int row) {
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
    const Int4Gemm& g = p.gemm;
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

/// The same of bfloat16: thread t copies eight columns, t % 16, of rows t / 16 + 8 i. They are of a quad's thread t % 16 / 4, two
/// for each half of two products.
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
    const int quad = piece / 4, word = piece % 4;
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
  Ring<C> ring;
  for (Walk<C> walk(p); !walk.done(); walk.next()) {
    const Tile tile = walk.tile();
    x.begin(tile);
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      ptx::mbarrier_wait(&s.empty[ring.slot], (ring.round & 1) ^ 1);
      if (thread == 0) load_weights(p, s, ring.slot, tile, step);
      x.copy(s, ring.slot, step);
      ptx::cp_async_arrive(&s.full[ring.slot]);
    }
  }
}

// ---- Products

/// A thread's 16 bytes `half` of a block of 64 rows and 128 columns: columns 16 half to 16 half + 15 of its 32, those of the
/// row lane / 4 in x and z, of lane / 4 + 8 in y and w. `box`: in shared memory.
__device__ __forceinline__ uint4 codes_of(std::uint32_t box, int warp, int lane, int half) {
  const int row = warp * 8 + lane / 4, piece = lane % 4 * 2 + half;
  return ptx::load_shared<uint4>(box + static_cast<std::uint32_t>(row * kStepK + ((piece ^ (row % 8)) * 16)));
}

/// part = a block of weights times the stage's rows of x. Queued.
template <class C>
__device__ __forceinline__ void multiply(float (&part)[C::kSums], std::uint32_t box, std::uint64_t x,
                                         int warp, int lane) {
  constexpr std::uint32_t kCodes = 0x0F0F0F0F;
  constexpr int kProducts = C::kBf16 ? 8 : 4;
  std::uint32_t a[kProducts][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 words = codes_of(box, warp, lane, half);
    const std::uint32_t of[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int word = 2 * half + i;
      if constexpr (C::kBf16) {
        const uint4 upper = expand_int4(of[i][0]), lower = expand_int4(of[i][1]);
        const std::uint32_t both[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                                          {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
        for (int j = 0; j < 8; ++j) a[2 * word + j / 4][j % 4] = both[j / 4][j % 4];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) a[word][j] = of[i][j % 2] >> (j / 2 * 4) & kCodes;
      }
    }
  }
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

/// sums += part times its scales. A thread has rows lane / 4 and lane / 4 + 8 of its warp's 16, which are two neighbours of W,
/// and of every 8 rows of x the two from lane % 4 * 2 on.
template <class C>
__device__ __forceinline__ void promote(float (&sums)[C::kSums], const float (&part)[C::kSums], float2 weight,
                                        const float* x_scales, const float* x_offsets, int lane) {
  constexpr float kOfCodes = 512.0f;
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
    float2 scale{}, offset{};
    if constexpr (!C::kBf16) {
      scale = *reinterpret_cast<const float2*>(x_scales + 8 * j + lane % 4 * 2);
      offset = *reinterpret_cast<const float2*>(x_offsets + 8 * j + lane % 4 * 2);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = part[4 * j + i];
      if constexpr (!C::kBf16) {
        value = i % 2 == 0 ? fmaf(value, scale.x * kOfCodes, -offset.x)
                           : fmaf(value, scale.y * kOfCodes, -offset.y);
      }
      sums[4 * j + i] = fmaf(value, i < 2 ? weight.x : weight.y, sums[4 * j + i]);
    }
  }
}

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
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      const int slot = ring.slot;
      ptx::mbarrier_wait(&s.full[slot], ring.round & 1);
      ptx::fence_async_proxy();  // rows of x came by cp.async; wgmma reads through the other proxy
      const std::uint64_t x = ptx::swizzled_descriptor(s.x[slot], 0, 8 * kStepK);
      const auto multiply_block = [&](float(&part)[C::kSums], int block) {
        multiply<C>(part, ptx::smem_address(s.weights[slot][2 * group + block]), x, warp, lane);
      };
      const auto add = [&](const float(&part)[C::kSums], int block) {
        const float2 weight = *reinterpret_cast<const float2*>(
            &s.weight_scales[slot][2 * group + block][warp * 16 + lane / 4 * 2]);
        promote<C>(sums[block], part, weight, s.x_scales[slot], s.x_offsets[slot], lane);
      };
      if constexpr (C::kRows <= 64) {
        float part[2][C::kSums];
        multiply_block(part[0], 0);
        multiply_block(part[1], 1);
        ptx::wgmma_wait<1>();
        add(part[0], 0);
        ptx::wgmma_wait<0>();
        add(part[1], 1);
      } else {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          float part[C::kSums];
          multiply_block(part, block);
          ptx::wgmma_wait<0>();
          add(part, block);
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
__global__ __launch_bounds__(kThreads, 1) void int4_gemm_kernel(const __grid_constant__ Params p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s =
      *reinterpret_cast<Shared<C>*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::mbarrier_init(&s.full[i], kWarpgroup + 1);  // every thread for its copies, and one for the boxes
      ptx::mbarrier_init(&s.empty[i], kWarps);
    }
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&p.weight_map);
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::set_max_registers_up<232>();
    multiply_tiles<C>(p, s);
  } else {
    ptx::set_max_registers_down<40>();
    copy<C>(p, s);
  }
}

}  // namespace flash_mla::sm90::int4
