// One product per attention head.
//
// Tile:      kRows (16 or 64) tokens x 32 outputs of one head, the whole depth in steps of 64. What lies
//            outside the matrices is zero.
// Threads:   4 warps, each with 16 rows x 8 or 16 outputs at a time (mma.m16n8k16).
// Memory:    9 stages (16 rows) or 3 (64 rows) of both operands, rows padded by 16 bytes so that the 8 rows
//            that ldmatrix reads lie in different banks: 61 or 41 KB.
// Registers: 48 to 56 a thread.
//
// Weights do not depend on the kernel before, so their first stages are fetched before it is waited for.

#include <cuda_bf16.h>

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/head_gemm.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/rows/sm90/row_math.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 32;
constexpr int kDepth = 64;
constexpr int kPitch = kDepth + 8;

struct Params {
  const bf16* x;
  const bf16* weight;
  bf16* out;
  std::int64_t x_stride, out_stride;
  int rows, heads, out_features, in_features, x_width, out_width, tail;
  const float* cosines;
  const float* sines;

  const bf16* kv;
  std::int64_t kv_stride;
  const float* kv_norm;
  float eps;
  const std::int64_t* slots;
  bf16* cache;
  int rank;
  bool wide_kv;
};

template <int kRows, int kStages>
constexpr int kSharedBytes = kStages*(kRows + kColumns) * kPitch * 2;

/// The keys of `rows` tokens, the block being the `part`-th of `parts` that share them.
__device__ void append(const Params& p, int first, int rows, int part, int parts) {
  for (int t = first + part; t < first + rows; t += parts) {
    const std::int64_t slot = p.slots != nullptr ? p.slots[t] : t;
    if (slot < 0) continue;
    const bf16* kv = p.kv + t * p.kv_stride;
    bf16* key = p.cache + slot * (p.rank + p.tail);
    if (p.wide_kv) {
      norm_row<8>(kv, p.kv_norm, p.eps, p.rank, key);
    } else {
      norm_row<1>(kv, p.kv_norm, p.eps, p.rank, key);
    }
    for (int i = threadIdx.x; i < p.tail / 2; i += kThreads) {
      const std::int64_t at = static_cast<std::int64_t>(t) * (p.tail / 2) + i;
      rotate(kv + p.rank + 2 * i, key + p.rank + 2 * i, p.cosines[at], p.sines[at]);
    }
  }
}

/// `count` rows of kDepth columns from column k on, of which `valid` rows and columns up to `depth` exist.
template <bool kWide>
__device__ void fetch(const bf16* from, std::int64_t stride, int valid, int k, int depth, int count,
                      bf16* to) {
  if constexpr (kWide) {
    for (int i = threadIdx.x; i < count * (kDepth / 8); i += kThreads) {
      const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
      const bool inside = row < valid && k + column < depth;
      const bf16* source = inside ? from + row * stride + k + column : from;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                       ptx::smem_address(to + row * kPitch + column)),
                   "l"(source), "r"(inside ? 16 : 0)
                   : "memory");
    }
  } else {
    for (int i = threadIdx.x; i < count * kDepth; i += kThreads) {
      const int row = i / kDepth, column = i % kDepth;
      const bool inside = row < valid && k + column < depth;
      to[row * kPitch + column] = inside ? from[row * stride + k + column] : __float2bfloat16(0.0f);
    }
  }
}

template <int kRows, int kStages, bool kWide>
__global__ void __launch_bounds__(kThreads) head_gemm_kernel(Params p) {
  extern __shared__ __align__(128) std::uint8_t shared[];
  auto& xs = *reinterpret_cast<bf16(*)[kStages][kRows][kPitch]>(shared);
  auto& ws = *reinterpret_cast<bf16(*)[kStages][kColumns][kPitch]>(shared + sizeof xs);
  // Up to two warps along the rows, the others along the outputs.
  constexpr int kRowTiles = kRows / 16, kWarpRows = kRowTiles >= 2 ? 2 : 1;
  constexpr int kWarpColumns = 4 / kWarpRows;           // warps along the outputs
  constexpr int kTilesM = kRowTiles / kWarpRows;        // 16-row tiles of a warp
  constexpr int kTilesN = kColumns / 8 / kWarpColumns;  // 8-output tiles of a warp
  static_assert(kTilesM >= 1 && kTilesN >= 1);

  const int head = static_cast<int>(blockIdx.z), first_row = static_cast<int>(blockIdx.y) * kRows;
  const int first = static_cast<int>(blockIdx.x) * kColumns;
  const bf16* weight = p.weight + (static_cast<std::int64_t>(head) * p.out_features + first) * p.in_features;
  const bf16* x = p.x + first_row * p.x_stride + static_cast<std::int64_t>(head) * p.x_width;
  const int rows = min(kRows, p.rows - first_row), columns = min(kColumns, p.out_features - first);
  const int steps = (p.in_features + kDepth - 1) / kDepth;
  if (head == p.heads) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    append(p, first_row, rows, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    return;
  }

  const auto fetch_weight = [&](int step) {
    fetch<kWide>(weight, p.in_features, columns, step * kDepth, p.in_features, kColumns,
                 &ws[step % kStages][0][0]);
  };
  const auto fetch_x = [&](int step) {
    fetch<kWide>(x, p.x_stride, rows, step * kDepth, p.in_features, kRows, &xs[step % kStages][0][0]);
  };
  for (int s = 0; s < kStages - 1 && s < steps; ++s) fetch_weight(s);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch_x(s);
    ptx::cp_async_commit();
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % kWarpRows * kTilesM * 16, warp_column = warp / kWarpRows * kTilesN * 8;
  float sums[kTilesM][kTilesN][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) {
      fetch_weight(step + kStages - 1);
      fetch_x(step + kStages - 1);
    }
    ptx::cp_async_commit();
    const auto& xt = xs[step % kStages];
    const auto& wt = ws[step % kStages];
    for (int k = 0; k < kDepth; k += 16) {
      unsigned a[kTilesM][4];
      for (int m = 0; m < kTilesM; ++m) {
        ldmatrix_x4(a[m], ptx::smem_address(&xt[warp_row + m * 16 + lane % 16][k + lane / 16 * 8]));
      }
      for (int n = 0; n < kTilesN; n += kTilesN >= 2 ? 2 : 1) {
        // Four 8x8 matrices: outputs n * 8 ... + 15, columns k ... + 15. With one tile the second pair of
        // addresses repeats the first.
        const int row = warp_column + n * 8 + lane % 8 + (kTilesN >= 2 ? lane / 16 * 8 : 0);
        unsigned b[4];
        ldmatrix_x4(b, ptx::smem_address(&wt[row][k + lane / 8 % 2 * 8]));
        for (int m = 0; m < kTilesM; ++m) {
          ptx::mma_m16n8k16_bf16(sums[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
          if constexpr (kTilesN >= 2)
            ptx::mma_m16n8k16_bf16(sums[m][n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
        }
      }
    }
  }

  bf16* out = p.out + first_row * p.out_stride + static_cast<std::int64_t>(head) * p.out_width;
  for (int m = 0; m < kTilesM; ++m) {
    for (int n = 0; n < kTilesN; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + m * 16 + lane / 4 + i / 2 * 8;
        const int column = warp_column + n * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && column < columns) {
          out[row * p.out_stride + first + column] = __float2bfloat16(sums[m][n][i]);
        }
      }
    }
  }
  if (blockIdx.x != 0) return;
  if (p.cosines != nullptr) {
    const int pairs = p.tail / 2;
    for (int i = threadIdx.x; i < rows * pairs; i += kThreads) {
      const int row = i / pairs, pair = i % pairs;
      const std::int64_t at = static_cast<std::int64_t>(first_row + row) * pairs + pair;
      rotate(x + row * p.x_stride + p.in_features + 2 * pair,
             out + row * p.out_stride + p.out_features + 2 * pair, p.cosines[at], p.sines[at]);
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * p.tail; i += kThreads) {
    const int row = i / p.tail, column = i % p.tail;
    out[row * p.out_stride + p.out_features + column] = x[row * p.x_stride + p.in_features + column];
  }
}

template <int kRows, int kStages>
void launch_tile(const Params& p, bool wide, bool with_append, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.out_features + kColumns - 1) / kColumns),
                  static_cast<unsigned>((p.rows + kRows - 1) / kRows),
                  static_cast<unsigned>(p.heads + with_append));
  constexpr int kBytes = kSharedBytes<kRows, kStages>;
  if (wide) {
    check(allow_shared_memory<head_gemm_kernel<kRows, kStages, true>>(kBytes), "cudaFuncSetAttribute");
    check(launch(LaunchConfig(grid, kThreads, kBytes, stream).programmatic(),
                 head_gemm_kernel<kRows, kStages, true>, p),
          "head_gemm");
  } else {
    check(allow_shared_memory<head_gemm_kernel<kRows, kStages, false>>(kBytes), "cudaFuncSetAttribute");
    check(launch(LaunchConfig(grid, kThreads, kBytes, stream).programmatic(),
                 head_gemm_kernel<kRows, kStages, false>, p),
          "head_gemm");
  }
}

}  // namespace

void head_gemm(const HeadGemm& a, cudaStream_t stream) {
  Params p{};
  p.x = reinterpret_cast<const bf16*>(a.x.data);
  p.weight = reinterpret_cast<const bf16*>(a.weight);
  p.out = reinterpret_cast<bf16*>(a.out.data);
  p.x_stride = a.x.stride;
  p.out_stride = a.out.stride;
  p.rows = static_cast<int>(a.x.rows);
  p.heads = a.heads;
  p.cosines = a.cosines;
  p.sines = a.sines;
  p.out_features = a.out_features;
  p.in_features = a.in_features;
  p.x_width = a.x_width;
  p.out_width = a.out_width;
  p.tail = a.tail;
  const bool wide = reinterpret_cast<std::uintptr_t>(a.x.data) % 16 == 0 && a.x.stride % 8 == 0 &&
                    a.x_width % 8 == 0 && a.in_features % 8 == 0 &&
                    reinterpret_cast<std::uintptr_t>(a.weight) % 16 == 0;
  const bool with_append = a.append.cache != nullptr;
  if (with_append) {
    const Matrix& kv = a.append.kv;
    p.kv = reinterpret_cast<const bf16*>(kv.data);
    p.kv_stride = kv.stride;
    p.kv_norm = a.append.norm;
    p.eps = a.append.eps;
    p.slots = a.append.slots;
    p.cache = reinterpret_cast<bf16*>(a.append.cache);
    p.rank = a.append.rank;
    p.wide_kv = reinterpret_cast<std::uintptr_t>(kv.data) % 16 == 0 && kv.stride % 8 == 0 &&
                p.rank % 8 == 0 && p.tail % 8 == 0;
  }
  // Few rows: what counts is that all of a tile's weights are on their way before the kernel in front has
  // finished (8 stages are a depth of 512).
  if (a.x.rows <= 16) {
    launch_tile<16, 9>(p, wide, with_append, stream);
  } else {
    launch_tile<64, 3>(p, wide, with_append, stream);
  }
}

}  // namespace flash_mla::sm90
