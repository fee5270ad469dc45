#pragma once

// out[pair] = x[pair / x_divisor] · weight[expert]^T over units of pairs that share an expert.
//
// Tile:      128 pairs x 256 rows of W (with silu_mul: 128 gate rows and the 128 up rows of the same
//            outputs), 64 columns of k a stage.
// Threads:   warpgroups 0 and 1 multiply, 64 pairs each (wgmma m64n256k16, 128 accumulators a thread; with
//            silu_mul a thread holds gate and up of the same outputs). Warpgroup 2 copies: rows of x are
//            gathered, so it uses cp.async, 16 bytes a thread, eight threads for 128 contiguous bytes.
// Memory:    4 stages of A (128 x 128 bytes) and B (256 x 128 bytes), in the 128-byte swizzle of wgmma:
//            192 KB.
// e4m3:      weights with scales come through the registers of warpgroup 2, a stage ahead, which writes them as
//            bfloat16: four threads for 64 contiguous codes. int4 the same way, two rows at a time.
// Registers: 65536 / 384 threads = 170 each, enough for the accumulators without setmaxnreg.
//
// A CTA takes tiles in turn; copies run ahead across them, so that results are stored under the next tile's
// copies.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/gemm/sm90/grouped_gemm.h"
#include "kernels/gemm/sm90/widen_e4m3.cuh"
#include "kernels/gemm/sm90/widen_int4.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90::grouped {

inline constexpr int kRows = kGroupedRows, kColumns = 256, kStepK = 64, kStages = 4;
inline constexpr int kRowBytes = kStepK * 2;
inline constexpr int kBytesA = kRows * kRowBytes, kStageBytes = kBytesA + kColumns * kRowBytes;
inline constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
inline constexpr int kRowsPerPass = kWarpgroup / 8;

struct Grid {
  std::int64_t column_tiles;
  int width;  // outputs of a tile
};

struct Tile {
  ExpertUnit unit;
  std::int64_t column;
};

__device__ inline Tile tile_at(const WeightStream& p, const Grid& grid, std::int64_t index) {
  const int* unit = &p.units[index / grid.column_tiles].expert;
  return {{__ldcg(unit), __ldcg(unit + 1), __ldcg(unit + 2)}, index % grid.column_tiles * grid.width};
}

struct Pipeline {
  std::uint64_t full[kStages], empty[kStages];
};
/// The stages, for whose swizzle 1024 bytes of alignment are needed, and behind them the pipeline.
inline constexpr int kSharedBytes = kStages * kStageBytes + 1024 + static_cast<int>(sizeof(Pipeline));

/// What a thread of the copying warpgroup reads of x: pieces of 16 bytes in rows kRowsPerPass apart.
struct RowsOfX {
  static constexpr int kPasses = kRows / kRowsPerPass;
  const __nv_bfloat16* rows[kPasses];
  std::uint32_t valid;

  __device__ RowsOfX(const WeightStream& p, const ExpertUnit& unit, int first_row) : valid(0) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = first_row + i * kRowsPerPass;
      rows[i] = static_cast<const __nv_bfloat16*>(p.x);
      if (row < unit.count) {
        valid |= 1u << i;
        rows[i] += std::int64_t(__ldcg(p.pairs + unit.first + row) / p.x_divisor) * p.x_stride;
      }
    }
  }

  __device__ void copy(std::uint32_t stage, std::int64_t column, bool inside) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool here = inside && (valid >> i & 1);
      ptx::cp_async_16(stage + i * kRowsPerPass * kRowBytes, rows[i] + (here ? column : 0), here ? 16 : 0);
    }
  }
};

/// The row of the weights, within an expert's, that row `row` of a tile at `column` stands for: with silu_mul the
/// second half of a tile's rows are the up rows of the same outputs. -1: there is none.
__device__ inline std::int64_t weight_row(const Grid& grid, std::int64_t outputs, std::int64_t column,
                                          int row) {
  const bool up = row >= grid.width;
  const std::int64_t output = column + (up ? row - grid.width : row);
  return output < outputs ? output + (up ? outputs : 0) : -1;
}

/// Where a thread puts its pieces in a stage. Rows 16 apart have the same place in the swizzle.
__device__ inline std::uint32_t swizzled(const std::uint8_t* shared, int row, int chunk) {
  return ptx::smem_address(shared) + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

/// Weights of bfloat16 as they are.
__device__ inline void copy_tiles(const WeightStream& p, const Grid& grid, std::int64_t tiles, int steps,
                                  std::uint8_t* shared, Pipeline& pipeline) {
  const int thread = threadIdx.x % kWarpgroup;
  const int chunk = thread % 8, first_row = thread / 8;
  constexpr int kPassesB = kColumns / kRowsPerPass;
  const std::uint32_t to = swizzled(shared, first_row, chunk);
  const std::int64_t outputs = p.silu_mul ? p.n / 2 : p.n;
  std::int64_t count = 0;  // stages so far
  for (std::int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_at(p, grid, index);
    const RowsOfX x(p, tile.unit, first_row);
    std::uint32_t valid_b = 0;
    const auto* weight =
        static_cast<const __nv_bfloat16*>(p.weight) + (tile.unit.expert * p.n + tile.column) * p.k;
#pragma unroll
    for (int i = 0; i < kPassesB; ++i) {
      const int row = (first_row + i * kRowsPerPass) % grid.width;
      if (tile.column + row < outputs) valid_b |= 1u << i;
    }
    for (int step = 0; step < steps; ++step, ++count) {
      const int slot = static_cast<int>(count % kStages);
      if (count >= kStages) ptx::mbarrier_wait(&pipeline.empty[slot], (count / kStages - 1) & 1);
      const std::int64_t column = std::int64_t(step) * kStepK + chunk * 8;
      const bool inside = column < p.k;
      const std::uint32_t stage = to + slot * kStageBytes;
      x.copy(stage, column, inside);
#pragma unroll
      for (int i = 0; i < kPassesB; ++i) {
        const bool valid = inside && (valid_b >> i & 1);
        const int row = first_row + i * kRowsPerPass;
        // With silu_mul the second half of the rows are the up rows of the same outputs.
        const std::int64_t at = row < grid.width ? row : row - grid.width + outputs;
        ptx::cp_async_16(stage + kBytesA + i * kRowsPerPass * kRowBytes,
                         weight + (valid ? at * p.k + column : 0), valid ? 16 : 0);
      }
      ptx::cp_async_arrive(&pipeline.full[slot]);
    }
  }
}

/// A thread's weights of a stage: 16 codes in rows kE4m3Rows apart, and their scales.
inline constexpr int kE4m3Rows = kWarpgroup / 4, kE4m3Passes = kColumns / kE4m3Rows;
struct E4m3Stage {
  uint4 codes[kE4m3Passes];
  float scales[kE4m3Passes];
};

__device__ __forceinline__ void load_stage(const WeightStream& p, const std::int64_t (&rows)[kE4m3Passes],
                                           std::int64_t expert, std::int64_t column, E4m3Stage& out) {
  const auto* codes = static_cast<const std::uint8_t*>(p.weight) + expert * p.n * p.k + column;
  const std::int64_t scale_columns = (p.k + 127) / 128;
  const float* scales = p.scales + expert * ((p.n + 7) / 8) * scale_columns + column / 128;
#pragma unroll
  for (int i = 0; i < kE4m3Passes; ++i) {
    out.codes[i] = make_uint4(0, 0, 0, 0);
    out.scales[i] = 0;
    if (rows[i] >= 0 && column < p.k) {
      out.codes[i] = __ldg(reinterpret_cast<const uint4*>(codes + rows[i] * p.k));
      out.scales[i] = __ldg(scales + rows[i] / 8 * scale_columns);
    }
  }
}

/// Weights of e4m3, widened on the way.
__device__ inline void copy_e4m3_tiles(const WeightStream& p, const Grid& grid, std::int64_t tiles, int steps,
                                       std::uint8_t* shared, Pipeline& pipeline) {
  const int thread = threadIdx.x % kWarpgroup;
  const int chunk = thread % 8, first_row = thread / 8;      // of x
  const int chunk_b = thread % 4, first_row_b = thread / 4;  // of the weights: 16 columns
  const std::uint32_t to = swizzled(shared, first_row, chunk);
  const std::uint32_t low = swizzled(shared, first_row_b, 2 * chunk_b) - ptx::smem_address(shared);
  const std::uint32_t high = swizzled(shared, first_row_b, 2 * chunk_b + 1) - ptx::smem_address(shared);
  const std::int64_t outputs = p.silu_mul ? p.n / 2 : p.n;
  std::int64_t count = 0;  // stages so far
  for (std::int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_at(p, grid, index);
    const RowsOfX x(p, tile.unit, first_row);
    std::int64_t rows[kE4m3Passes];
#pragma unroll
    for (int i = 0; i < kE4m3Passes; ++i) {
      rows[i] = weight_row(grid, outputs, tile.column, first_row_b + i * kE4m3Rows);
    }
    E4m3Stage now, next;
    load_stage(p, rows, tile.unit.expert, chunk_b * 16, now);
    for (int step = 0; step < steps; ++step, ++count) {
      const int slot = static_cast<int>(count % kStages);
      if (count >= kStages) ptx::mbarrier_wait(&pipeline.empty[slot], (count / kStages - 1) & 1);
      const std::int64_t column = std::int64_t(step) * kStepK + chunk * 8;
      x.copy(to + slot * kStageBytes, column, column < p.k);
      ptx::cp_async_arrive(&pipeline.full[slot]);
      // On their way while this stage's are widened; past the last column there are none.
      load_stage(p, rows, tile.unit.expert, std::int64_t(step + 1) * kStepK + chunk_b * 16, next);
      std::uint8_t* const stage = shared + slot * kStageBytes + kBytesA;
#pragma unroll
      for (int i = 0; i < kE4m3Passes; ++i) {
        const uint4 codes = now.codes[i];
        const std::uint32_t at = i * kE4m3Rows * kRowBytes;
        *reinterpret_cast<uint4*>(stage + low + at) = widen_e4m3(codes.x, codes.y, now.scales[i]);
        *reinterpret_cast<uint4*>(stage + high + at) = widen_e4m3(codes.z, codes.w, now.scales[i]);
      }
      ptx::fence_async_proxy();  // ordinary writes, read by wgmma
      ptx::mbarrier_arrive(&pipeline.full[slot]);
      now = next;
    }
  }
}

/// A thread's int4 weights of a stage: 16 columns of pairs of rows kE4m3Rows pairs apart, and the scales of both rows.
inline constexpr int kInt4Passes = kColumns / 2 / kE4m3Rows;
struct Int4Stage {
  uint4 codes[kInt4Passes];
  float2 scales[kInt4Passes];
};

/// `rows`: the upper of each pair, -1 for none.
__device__ __forceinline__ void load_stage(const WeightStream& p, const std::int64_t (&rows)[kInt4Passes],
                                           std::int64_t expert, std::int64_t column, Int4Stage& out) {
  const auto* codes = static_cast<const std::uint8_t*>(p.weight) + expert * (p.n / 2) * p.k + column;
  const float* scales = p.scales + (expert * ((p.k + 127) / 128) + column / 128) * p.n;
#pragma unroll
  for (int i = 0; i < kInt4Passes; ++i) {
    out.codes[i] = make_uint4(0, 0, 0, 0);
    out.scales[i] = make_float2(0, 0);
    if (rows[i] >= 0 && column < p.k) {
      out.codes[i] = __ldg(reinterpret_cast<const uint4*>(codes + rows[i] / 2 * p.k));
      out.scales[i] = __ldg(reinterpret_cast<const float2*>(scales + rows[i]));
    }
  }
}

/// Weights of int4, widened on the way.
__device__ inline void copy_int4_tiles(const WeightStream& p, const Grid& grid, std::int64_t tiles, int steps,
                                       std::uint8_t* shared, Pipeline& pipeline) {
  const int thread = threadIdx.x % kWarpgroup;
  const int chunk = thread % 8, first_row = thread / 8;          // of x
  const int chunk_b = thread % 4, first_row_b = thread / 4 * 2;  // of the weights: 16 columns of two rows
  const std::uint32_t to = swizzled(shared, first_row, chunk);
  std::uint32_t
      place[4];  // of the words of a piece: 8 columns of the upper row, of the lower, 8 more of both
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    place[w] = swizzled(shared, first_row_b + w % 2, 2 * chunk_b + w / 2) - ptx::smem_address(shared);
  }
  const std::int64_t outputs = p.silu_mul ? p.n / 2 : p.n;
  std::int64_t count = 0;  // stages so far
  for (std::int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_at(p, grid, index);
    const RowsOfX x(p, tile.unit, first_row);
    std::int64_t rows[kInt4Passes];
#pragma unroll
    for (int i = 0; i < kInt4Passes; ++i) {
      rows[i] = weight_row(grid, outputs, tile.column, first_row_b + i * 2 * kE4m3Rows);
    }
    Int4Stage now, next;
    load_stage(p, rows, tile.unit.expert, chunk_b * 16, now);
    for (int step = 0; step < steps; ++step, ++count) {
      const int slot = static_cast<int>(count % kStages);
      if (count >= kStages) ptx::mbarrier_wait(&pipeline.empty[slot], (count / kStages - 1) & 1);
      const std::int64_t column = std::int64_t(step) * kStepK + chunk * 8;
      x.copy(to + slot * kStageBytes, column, column < p.k);
      ptx::cp_async_arrive(&pipeline.full[slot]);
      load_stage(p, rows, tile.unit.expert, std::int64_t(step + 1) * kStepK + chunk_b * 16, next);
      std::uint8_t* const stage = shared + slot * kStageBytes + kBytesA;
#pragma unroll
      for (int i = 0; i < kInt4Passes; ++i) {
        const std::uint32_t words[4] = {now.codes[i].x, now.codes[i].y, now.codes[i].z, now.codes[i].w};
        std::uint8_t* const at = stage + i * 2 * kE4m3Rows * kRowBytes;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float scale = w % 2 == 0 ? now.scales[i].x : now.scales[i].y;
          *reinterpret_cast<uint4*>(at + place[w]) = widen_int4(words[w], scale);
        }
      }
      ptx::fence_async_proxy();  // ordinary writes, read by wgmma
      ptx::mbarrier_arrive(&pipeline.full[slot]);
      now = next;
    }
  }
}

__device__ inline void multiply_tiles(const WeightStream& p, const Grid& grid, std::int64_t tiles, int steps,
                                      const std::uint8_t* shared, Pipeline& pipeline) {
  const int group = threadIdx.x / kWarpgroup;
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  const std::int64_t outputs = p.silu_mul ? p.n / 2 : p.n;
  std::int64_t count = 0;
  for (std::int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    float sums[128];
    for (int step = 0; step < steps; ++step, ++count) {
      const int slot = static_cast<int>(count % kStages);
      ptx::mbarrier_wait(&pipeline.full[slot], (count / kStages) & 1);
      ptx::fence_async_proxy();  // the copies were ordinary writes, wgmma reads through the other proxy
      const std::uint8_t* const a = shared + slot * kStageBytes + group * 64 * kRowBytes;
      const std::uint8_t* const b = shared + slot * kStageBytes + kBytesA;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepK / 16; ++k) {
        ptx::wgmma_ss<true, false>(sums, ptx::swizzled_descriptor(a + k * 32, 0, 8 * kRowBytes),
                                   ptx::swizzled_descriptor(b + k * 32, 0, 8 * kRowBytes), step + k > 0);
      }
      ptx::wgmma_commit();
      if (step > 0) {
        ptx::wgmma_wait<1>();
        if (threadIdx.x % kWarpgroup == 0) ptx::mbarrier_arrive(&pipeline.empty[(count - 1) % kStages]);
      }
    }
    ptx::wgmma_wait<0>();
    if (threadIdx.x % kWarpgroup == 0) ptx::mbarrier_arrive(&pipeline.empty[(count - 1) % kStages]);

    const Tile tile = tile_at(p, grid, index);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 64 + warp * 16 + half * 8 + lane / 4;
      if (row >= tile.unit.count) continue;
      const std::int64_t pair = __ldcg(p.pairs + tile.unit.first + row);
      const std::int64_t first = tile.column + lane % 4 * 2;
      const auto store = [&](std::int64_t column, float u, float v) {
        if (column >= outputs) return;  // outputs is even
        const std::int64_t at = pair * p.out_stride + column;
        if (p.out_fp32) {
          *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at) = make_float2(u, v);
        } else {
          *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p.out) + at) =
              __floats2bfloat162_rn(u, v);
        }
      };
      if (p.silu_mul) {
        const auto gated = [](float gate, float up) { return silu(gate) * up; };
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int at = 4 * j + 2 * half;
          store(first + 8 * j, gated(sums[at], sums[at + 64]), gated(sums[at + 1], sums[at + 65]));
        }
      } else {
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          const int at = 4 * j + 2 * half;
          store(first + 8 * j, sums[at], sums[at + 1]);
        }
      }
    }
  }
}

template <StreamWeight kWeight>
__global__ __launch_bounds__(kThreads, 1) void grouped_gemm(const __grid_constant__ WeightStream p,
                                                            const __grid_constant__ Grid grid) {
  extern __shared__ std::uint8_t raw[];
  std::uint8_t* const shared = raw + (1024 - ptx::smem_address(raw) % 1024) % 1024;
  Pipeline& pipeline = *reinterpret_cast<Pipeline*>(shared + kStages * kStageBytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      // Where weights are widened a thread arrives for its copies of x and for those that it wrote itself.
      ptx::mbarrier_init(&pipeline.full[i], kWeight == StreamWeight::kBf16 ? kWarpgroup : 2 * kWarpgroup);
      ptx::mbarrier_init(&pipeline.empty[i], 2);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t tiles = grid.column_tiles * __ldcg(p.num_units);
  const int steps = static_cast<int>((p.k + kStepK - 1) / kStepK);
  if (threadIdx.x / kWarpgroup == 2) {
    if constexpr (kWeight == StreamWeight::kE4m3) {
      copy_e4m3_tiles(p, grid, tiles, steps, shared, pipeline);
    } else if constexpr (kWeight == StreamWeight::kInt4) {
      copy_int4_tiles(p, grid, tiles, steps, shared, pipeline);
    } else {
      copy_tiles(p, grid, tiles, steps, shared, pipeline);
    }
  } else {
    multiply_tiles(p, grid, tiles, steps, shared, pipeline);
  }
}

}  // namespace flash_mla::sm90::grouped
