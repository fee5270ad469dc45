#pragma once

// out^T = weight · x^T in W4A8, for int4_gemm.h.
//
// Tile:      256 rows of W (kSilu: 128 gate rows and the up rows of the same outputs) times up to kRows = 16 to 128 rows of
//            x, 128 columns of k a stage.
// Threads:   warpgroups 0 and 1 multiply, each two blocks of 64 rows of W (wgmma m64nNk32): the weights are A, in registers, x
//            is B. What 128 columns of k give is multiplied by its scales and added in registers. Warpgroup 2 copies: one
//            thread asks the copy engine for boxes of weights, all gather rows of x, 16 bytes each.
// Memory:    5 to 10 stages of weights (16 KB), x (2 to 16 KB) and scales: 208 KB.
// Registers: 232 for warpgroups that multiply (64 to 128 sums, 64 of a stage), 40 for the one that copies.
//
// Codes:     a code of 0 to 15 is as e4m3 itself times 2^-9 (subnormal below 8): to expand eight of them takes a shift and two
//            masks. Their zero is 8, so that x's sum times 8 is taken off where products are scaled; the 2^9 is in x's scale.
// Order:     16 bytes of weights are 16 columns of rows 2 r and 2 r + 1 (int4_weights.h), which are rows r and r + 8 of a
//            warp's 16. Thread t of a quad takes columns 32 t to 32 t + 31, eight for each of four products; x lies so that
//            these are the columns which wgmma gives that thread (int4_order).
//
// CTAs take tiles in turn; copies run ahead across them.

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/int4_gemm_results.cuh"
#include "kernels/gemm/sm90/int4_gemm_tiles.cuh"
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

/// A warpgroup: thread t copies piece t % 8 of rows t / 8 + 16 i, and scales of row t.
template <class C>
__device__ __forceinline__ void copy(const Params& p, Shared<C>& s) {
  constexpr int kRowsPerPass = kWarpgroup / 8, kPasses = C::kRows / kRowsPerPass;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int first_row = thread / 8, piece = thread % 8;
  const Int4Gemm& g = p.gemm;
  const auto source = [&](const Tile& tile, int row) {
    if (row >= tile.unit.count) return -1;
    const int position = tile.unit.first + row;
    return g.gather && g.pairs != nullptr ? __ldcg(g.pairs + position) / g.x_divisor : position;
  };
  Ring<C> ring;
  for (Walk<C> walk(p); !walk.done(); walk.next()) {
    const Tile tile = walk.tile();
    int rows[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows[i] = source(tile, first_row + i * kRowsPerPass);
    const int own = thread < C::kRows ? source(tile, thread) : -1;
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      const int slot = ring.slot;
      ptx::mbarrier_wait(&s.empty[slot], (ring.round & 1) ^ 1);
      if (thread == 0) load_weights(p, s, slot, tile, step);
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
      ptx::cp_async_arrive(&s.full[slot]);
    }
  }
}

// ---- Products

/// What a thread holds of a block of 64 rows and 128 columns, as A of four products. `box`: in shared memory.
__device__ __forceinline__ void expand(std::uint32_t box, int warp, int lane, std::uint32_t (&a)[4][4]) {
  constexpr std::uint32_t kCodes = 0x0F0F0F0F;
  const int row = warp * 8 + lane / 4, first = lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto at = static_cast<std::uint32_t>(row * kStepK + (((first + half) ^ (row % 8)) * 16));
    const uint4 words = ptx::load_shared<uint4>(box + at);
    const std::uint32_t of[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      std::uint32_t(&to)[4] = a[2 * half + i];
      to[0] = of[i][0] & kCodes;
      to[1] = of[i][1] & kCodes;
      to[2] = of[i][0] >> 4 & kCodes;
      to[3] = of[i][1] >> 4 & kCodes;
    }
  }
}

template <int kSums>
__device__ __forceinline__ void multiply(float (&part)[kSums], const std::uint32_t (&a)[4][4],
                                         std::uint64_t x) {
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    ptx::wgmma_e4m3(part, a[i], ptx::advance(x, static_cast<std::uint32_t>(2 * i)), i > 0);
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
    const float2 scale = *reinterpret_cast<const float2*>(x_scales + 8 * j + lane % 4 * 2);
    const float2 offset = *reinterpret_cast<const float2*>(x_offsets + 8 * j + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = (i % 2 == 0 ? scale.x : scale.y) * kOfCodes, off = i % 2 == 0 ? offset.x : offset.y;
      sums[4 * j + i] = fmaf(fmaf(part[4 * j + i], x, -off), i < 2 ? weight.x : weight.y, sums[4 * j + i]);
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
      const auto scale_of = [&](int block) {
        return *reinterpret_cast<const float2*>(
            &s.weight_scales[slot][2 * group + block][warp * 16 + lane / 4 * 2]);
      };
      if constexpr (C::kRows <= 64) {
        float part[2][C::kSums];
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          std::uint32_t a[4][4];
          expand(ptx::smem_address(s.weights[slot][2 * group + block]), warp, lane, a);
          multiply(part[block], a, x);
        }
        ptx::wgmma_wait<1>();
        promote<C>(sums[0], part[0], scale_of(0), s.x_scales[slot], s.x_offsets[slot], lane);
        ptx::wgmma_wait<0>();
        promote<C>(sums[1], part[1], scale_of(1), s.x_scales[slot], s.x_offsets[slot], lane);
      } else {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          std::uint32_t a[4][4];
          float part[C::kSums];
          expand(ptx::smem_address(s.weights[slot][2 * group + block]), warp, lane, a);
          multiply(part, a, x);
          ptx::wgmma_wait<0>();
          promote<C>(sums[block], part, scale_of(block), s.x_scales[slot], s.x_offsets[slot], lane);
        }
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.empty[slot]);
    }
    if constexpr (C::kSilu) {
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
