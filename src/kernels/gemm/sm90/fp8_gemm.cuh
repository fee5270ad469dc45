#pragma once

// out = x · weight^T in FP8, for fp8_gemm.h.
//
// Tile:      128 rows of x times kColumns = 256 (128) rows of the weights, 128 columns of k a stage. With kSilu half of
//            them are gate rows and half the up rows of the same outputs, in turns of 64.
// Threads:   warpgroups 0 and 1 multiply, each all rows by half of the tile's columns (wgmma m64n128k32; m64n64k32): 64
//            rows at a time, of which a unit may have fewer than two. What 128 columns of k give is multiplied by their
//            scales and added in registers while the other warpgroup has the tensor cores. Warpgroup 2 copies: one
//            thread asks the copy engine for boxes of 64 rows; with kGather rows of x come by cp.async, 16 bytes a
//            thread. Scales are read by those who multiply, a stage ahead.
// Memory:    4 (6) stages of x (16 KB) and weights (32 or 16 KB), in the 128-byte swizzle of wgmma: 192 KB.
// Registers: 232 for warpgroups that multiply (128 sums, 64 for a stage's), 40 for the one that copies.
//
// CTAs take tiles in turn; copies run ahead across them.

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/fp8_gemm_results.cuh"
#include "kernels/gemm/sm90/fp8_gemm_tiles.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma_e4m3.cuh"

namespace flash_mla::sm90::fp8 {

// ---- Copies

/// Asks for a stage's boxes.
template <class C>
__device__ __forceinline__ void load_boxes(const Params& p, Shared<C>& s, int slot, const Tile& tile,
                                           int step) {
  const int boxes_of_x = C::kGather ? 0 : (tile.unit.count + kBoxRows - 1) / kBoxRows;
  std::uint64_t* const full = &s.full[slot];
  ptx::mbarrier_arrive_expect_tx(full,
                                 static_cast<std::uint32_t>(boxes_of_x * kBoxBytes + C::kColumns * kStepK));
  std::uint8_t* const stage = s.stages[slot];
  const int at = step * (kStepK / 2);
  for (int i = 0; i < boxes_of_x; ++i) {
    ptx::tma_load_5d(stage + i * kBoxBytes, &p.x_map, full, at, tile.unit.first + i * kBoxRows, 0, 0, 0);
  }
  constexpr int kBoxes = C::kColumns / kBoxRows;
  const int outputs = static_cast<int>(p.gemm.n) / 2;
  for (int i = 0; i < kBoxes; ++i) {
    const int row = C::kSilu ? tile.column + i / 2 * kBoxRows + i % 2 * outputs : tile.column + i * kBoxRows;
    ptx::tma_load_5d(stage + kBytesA + i * kBoxBytes, &p.weight_map, full, at, row, tile.unit.expert, 0, 0);
  }
}

/// One thread.
template <class C>
__device__ __forceinline__ void copy_boxes(const Params& p, Shared<C>& s) {
  Ring<C> ring;
  for (Walk<C> walk(p); !walk.done(); walk.next()) {
    const Tile tile = walk.tile();
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      ptx::mbarrier_wait(&s.empty[ring.slot], (ring.round & 1) ^ 1);
      load_boxes(p, s, ring.slot, tile, step);
    }
  }
}

/// A warpgroup: thread t copies piece t % 8 of rows t / 8 + 16 i.
template <class C>
__device__ __forceinline__ void copy_gathered(const Params& p, Shared<C>& s) {
  constexpr int kRowsPerPass = kWarpgroup / 8, kPasses = kRows / kRowsPerPass;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int first_row = thread / 8, piece = thread % 8;
  const std::uint32_t to = ptx::smem_address(s.stages[0]) +
                           static_cast<std::uint32_t>(first_row * kStepK + ((piece ^ (first_row % 8)) * 16));
  Ring<C> ring;
  for (Walk<C> walk(p); !walk.done(); walk.next()) {
    const Tile tile = walk.tile();
    int rows[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = first_row + i * kRowsPerPass;
      rows[i] = -1;
      if (row < tile.unit.count) {
        const int position = tile.unit.first + row;
        rows[i] = p.gemm.pairs != nullptr ? __ldcg(p.gemm.pairs + position) / p.gemm.x_divisor : position;
      }
    }
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      ptx::mbarrier_wait(&s.empty[ring.slot], (ring.round & 1) ^ 1);
      if (thread == 0) load_boxes(p, s, ring.slot, tile, step);
      const int column = step * kStepK + piece * 16;
      const std::uint32_t stage = to + static_cast<std::uint32_t>(ring.slot * C::kStageBytes);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool here = rows[i] >= 0 && column < p.gemm.k;
        const auto* const from = static_cast<const std::uint8_t*>(p.gemm.x) +
                                 (here ? std::int64_t{rows[i]} * p.gemm.x_stride + column : 0);
        ptx::cp_async_16(stage + static_cast<std::uint32_t>(i * kRowsPerPass * kStepK), from, here ? 16 : 0);
      }
      ptx::cp_async_arrive(&s.full[ring.slot]);
    }
  }
}

// ---- Products

/// Scales that a thread reads for a stage: of its four rows and, of the weights, of the 8 columns of its lane's number
/// (kBlocks: of the first and the second half of the warpgroup's).
template <class C>
struct Scales {
  float x[2][2];
  float weight[2];
};

template <class C>
struct ScaleReader {
  std::uint32_t x[2][2], weight[2];  // from where on
  const float* of_x;
  const float* of_weight;

  __device__ ScaleReader(const Params& p, const Tile& tile, int group, int warp, int lane)
      : of_x(p.gemm.x_scales),
        of_weight(p.gemm.weight_scales + std::int64_t{tile.unit.expert} * p.scale_rows * p.scale_columns) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2 * 64 + warp * 16 + i % 2 * 8 + lane / 4;
      int from = 0;  // some row, for none
      if (row < tile.unit.count) {
        from = tile.unit.first + row;
        if (C::kGather && p.gemm.pairs != nullptr) from = __ldcg(p.gemm.pairs + from) / p.gemm.x_divisor;
      }
      x[i / 2][i % 2] = static_cast<std::uint32_t>(from) * p.scale_columns;
    }
    constexpr int kHalf = C::kGroups / 2;
    const int own = C::kBlocks ? 0 : lane % C::kGroups;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = C::kBlocks ? half * kHalf : own;  // among the warpgroup's groups of 8 columns
      const int first = tile.column + group * C::kOwnColumns / (C::kSilu ? 2 : 1);
      const int up = C::kSilu && at >= kHalf ? static_cast<int>(p.gemm.n) / 2 - kHalf * 8 : 0;
      const int row = min((first + up) / 8 + at, static_cast<int>(p.scale_rows) - 1);
      weight[half] = static_cast<std::uint32_t>(row) * p.scale_columns;
    }
  }

  __device__ __forceinline__ Scales<C> read(int step) const {
    Scales<C> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.x[i / 2][i % 2] = __ldg(of_x + x[i / 2][i % 2] + step);
    out.weight[0] = __ldg(of_weight + weight[0] + step);
    out.weight[1] = C::kBlocks && C::kSilu ? __ldg(of_weight + weight[1] + step) : out.weight[0];
    return out;
  }
};

/// Named barriers: by which a warpgroup waits for its turn, beside one for highest magnitudes.
constexpr int kTurns = 2;

/// part = 64 rows of A times the warpgroup's of B over a stage. `turns`: as soon as all but the last of the other
/// warpgroup's products are done. Side by side, both would be done late and then leave the tensor cores idle together.
template <int kSums>
__device__ __forceinline__ void multiply_stage(float (&part)[kSums], std::uint64_t a, std::uint64_t b,
                                               bool turns, int group) {
  constexpr int kProducts = kStepK / 32;
  if (turns) ptx::named_barrier_sync<2 * kWarpgroup>(kTurns + group);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kProducts; ++k) {
    ptx::wgmma_e4m3(part, ptx::advance(a, static_cast<std::uint32_t>(2 * k)),
                    ptx::advance(b, static_cast<std::uint32_t>(2 * k)), k > 0);
    if (k >= kProducts - 2) ptx::wgmma_commit();
  }
  ptx::wgmma_wait<1>();
  if (turns) ptx::named_barrier_arrive<2 * kWarpgroup>(kTurns + 1 - group);
  ptx::wgmma_wait<0>();
}

/// sums += part times its scales.
template <class C>
__device__ __forceinline__ void promote(float (&sums)[C::kSums], const float (&part)[C::kSums],
                                        const float (&x)[2], const float (&weight)[2]) {
#pragma unroll
  for (int j = 0; j < C::kGroups; ++j) {
    const float w = C::kBlocks ? weight[j >= C::kGroups / 2] : __shfl_sync(~0u, weight[0], j);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[4 * j + i] = fmaf(part[4 * j + i], x[i / 2] * w, sums[4 * j + i]);
  }
}

template <class C>
__device__ __forceinline__ void multiply_tiles(const Params& p, Shared<C>& s) {
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kWarpgroup, warp = thread % kWarpgroup / 32, lane = thread % 32;
  const bool turns = p.gemm.tiles.turns;
  if (turns && group == 1) ptx::named_barrier_arrive<2 * kWarpgroup>(kTurns);  // the first is group 0's
  Ring<C> ring;
  int parity = 0;
  for (Walk<C> walk(p); !walk.done(); walk.next(), parity ^= 1) {
    const Tile tile = walk.tile();
    // Blocks of 64 rows that there are, told so that the compiler knows it alike in all lanes.
    const int blocks = __shfl_sync(~0u, (tile.unit.count + 63) / 64, 0);
    const ScaleReader<C> reader(p, tile, group, warp, lane);
    float sums[2][C::kSums];
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sums[0][i] = sums[1][i] = 0.0f;
    Scales<C> next = reader.read(0);
    for (int step = 0; step < p.steps; ++step, ring.next()) {
      const Scales<C> scales = next;
      ptx::mbarrier_wait(&s.full[ring.slot], ring.round & 1);
      // Rows that came by cp.async are ordinary writes; wgmma reads through the other proxy.
      if constexpr (C::kGather) ptx::fence_async_proxy();
      if (step + 1 < p.steps) next = reader.read(step + 1);  // behind the fence, which would wait for it
      const std::uint8_t* const stage = s.stages[ring.slot];
      const std::uint64_t a = ptx::swizzled_descriptor(stage, 0, 8 * kStepK);
      const std::uint64_t b =
          ptx::swizzled_descriptor(stage + kBytesA + group * C::kOwnColumns * kStepK, 0, 8 * kStepK);
      float part[C::kSums];
      if (blocks > 0) {
        multiply_stage(part, a, b, turns, group);
        promote<C>(sums[0], part, scales.x[0], scales.weight);
      }
      if (blocks > 1) {
        multiply_stage(part, ptx::advance(a, 64 * kStepK / 16), b, turns, group);
        if (lane == 0) ptx::mbarrier_arrive(&s.empty[ring.slot]);
        promote<C>(sums[1], part, scales.x[1], scales.weight);
      } else if (lane == 0) {
        ptx::mbarrier_arrive(&s.empty[ring.slot]);
      }
    }
    if constexpr (C::kSilu) {
      store_quantised<C>(p, s, tile, sums, parity, group, warp, lane);
    } else {
      if (blocks > 0) store<C>(p, tile, sums[0], 0, group, warp, lane);
      if (blocks > 1) store<C>(p, tile, sums[1], 64, group, warp, lane);
    }
  }
}

template <class C>
__global__ __launch_bounds__(kThreads, 1) void fp8_gemm_kernel(const __grid_constant__ Params p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s =
      *reinterpret_cast<Shared<C>*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      // With kGather every thread arrives for its copies, and one for the boxes.
      ptx::mbarrier_init(&s.full[i], C::kGather ? kWarpgroup + 1 : 1);
      ptx::mbarrier_init(&s.empty[i], 2 * kWarpgroup / 32);
    }
    ptx::fence_barrier_init();
    ptx::prefetch_tensor_map(&p.weight_map);
    if constexpr (!C::kGather) ptx::prefetch_tensor_map(&p.x_map);
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (threadIdx.x < 2 * kWarpgroup) {
    ptx::set_max_registers_up<232>();
    multiply_tiles<C>(p, s);
  } else {
    ptx::set_max_registers_down<40>();
    if constexpr (C::kGather) {
      copy_gathered<C>(p, s);
    } else {
      if (threadIdx.x / 32 == 2 * kWarpgroup / 32 && ptx::elect_one()) copy_boxes<C>(p, s);
    }
  }
}

}  // namespace flash_mla::sm90::fp8
