// out[pair] = x[pair / x_divisor] · weight[expert]^T over units of pairs that share an expert.
//
// Tile:      128 pairs x 256 rows of W (with silu_mul: 128 gate rows and the 128 up rows of the same
//            outputs), 64 columns of k a stage.
// Threads:   warpgroups 0 and 1 multiply, 64 pairs each (wgmma m64n256k16, 128 accumulators a thread; with
//            silu_mul a thread holds gate and up of the same outputs). Warpgroup 2 copies: rows of x are
//            gathered, so it uses cp.async, 16 bytes a thread, eight threads for 128 contiguous bytes.
// Memory:    4 stages of A (128 x 128 bytes) and B (256 x 128 bytes), in the 128-byte swizzle of wgmma:
//            192 KB.
// Registers: 65536 / 384 threads = 170 each, enough for the accumulators without setmaxnreg.
//
// A CTA takes tiles in turn; copies run ahead across them, so that results are stored under the next tile's
// copies.

#include <cuda_bf16.h>

#include <algorithm>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/grouped_gemm.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kRows = kGroupedRows, kColumns = 256, kStepK = 64, kStages = 4;
constexpr int kRowBytes = kStepK * 2;
constexpr int kBytesA = kRows * kRowBytes, kStageBytes = kBytesA + kColumns * kRowBytes;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // the swizzle asks for 1024-byte alignment
constexpr int kRowsPerPass = kWarpgroup / 8;

struct Grid {
  std::int64_t column_tiles;
  int width;  // outputs of a tile
};

struct Tile {
  ExpertUnit unit;
  std::int64_t column;
};

__device__ Tile tile_at(const WeightStream& p, const Grid& grid, std::int64_t index) {
  const int* unit = &p.units[index / grid.column_tiles].expert;
  return {{__ldcg(unit), __ldcg(unit + 1), __ldcg(unit + 2)}, index % grid.column_tiles * grid.width};
}

struct Pipeline {
  std::uint64_t full[kStages], empty[kStages];
};

__device__ void copy_tiles(const WeightStream& p, const Grid& grid, std::int64_t tiles, int steps,
                           std::uint8_t* shared, Pipeline& pipeline) {
  const int thread = threadIdx.x % kWarpgroup;
  const int chunk = thread % 8, first_row = thread / 8;
  constexpr int kPassesA = kRows / kRowsPerPass, kPassesB = kColumns / kRowsPerPass;
  // Rows 16 apart have the same place in the swizzle.
  const std::uint32_t to =
      ptx::smem_address(shared) + first_row * kRowBytes + ((chunk ^ (first_row & 7)) << 4);
  const std::int64_t outputs = p.silu_mul ? p.n / 2 : p.n;
  std::int64_t count = 0;  // stages so far
  for (std::int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_at(p, grid, index);
    const __nv_bfloat16* rows[kPassesA];
    std::uint32_t valid_a = 0, valid_b = 0;
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      const int row = first_row + i * kRowsPerPass;
      rows[i] = static_cast<const __nv_bfloat16*>(p.x);
      if (row < tile.unit.count) {
        valid_a |= 1u << i;
        rows[i] += std::int64_t(__ldcg(p.pairs + tile.unit.first + row) / p.x_divisor) * p.x_stride;
      }
    }
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
#pragma unroll
      for (int i = 0; i < kPassesA; ++i) {
        const bool valid = inside && (valid_a >> i & 1);
        ptx::cp_async_16(stage + i * kRowsPerPass * kRowBytes, rows[i] + (valid ? column : 0),
                         valid ? 16 : 0);
      }
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

__device__ void multiply_tiles(const WeightStream& p, const Grid& grid, std::int64_t tiles, int steps,
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

__global__ __launch_bounds__(kThreads, 1) void grouped_gemm(const __grid_constant__ WeightStream p,
                                                            const __grid_constant__ Grid grid) {
  extern __shared__ std::uint8_t raw[];
  __shared__ Pipeline pipeline;
  std::uint8_t* const shared = raw + (1024 - ptx::smem_address(raw) % 1024) % 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&pipeline.full[i], kWarpgroup);
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
    copy_tiles(p, grid, tiles, steps, shared, pipeline);
  } else {
    multiply_tiles(p, grid, tiles, steps, shared, pipeline);
  }
}

}  // namespace

cudaError_t launch_grouped_gemm(const WeightStream& args, cudaStream_t stream) {
  if (args.units == nullptr || args.bias != nullptr || args.accumulate || args.weight_fp32 ||
      args.out_stride % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  if (const cudaError_t e = allow_shared_memory<grouped_gemm>(kSharedBytes)) return e;
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  Grid grid{};
  grid.width = args.silu_mul ? kColumns / 2 : kColumns;
  grid.column_tiles = ((args.silu_mul ? args.n / 2 : args.n) + grid.width - 1) / grid.width;
  const std::int64_t most = grid.column_tiles * args.max_units;
  LaunchConfig config(static_cast<unsigned>(std::min<std::int64_t>(most, num_sms)), kThreads, kSharedBytes,
                      stream);
  return launch(config.programmatic(args.programmatic_launch), grouped_gemm, args, grid);
}

}  // namespace flash_mla::sm90
