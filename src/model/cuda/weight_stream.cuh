#pragma once

// out^T = W x^T with the weights streamed through shared memory once.
//
// Tile:    kWarpsN * kTiles * 16 rows of W by all of the CTA's k, for 8 * kGroups rows of x. The weights are
// the
//          16-row operand of mma.m16n8k16, so that few rows of x waste little.
// Threads: kWarpsN x kWarpsK warps. Warps of one k group share its x; k groups take turns at blocks of 64
// along
//          k and are summed in order at the end, then the CTAs of a cluster in order of rank. No atomics.
// Memory:  a ring of kDepth stages; a stage is 32 columns of k for every k group. Its layout is that of the
//          registers: a thread copies 16 bytes (8 columns) of a row of W to its own place and reads them back
//          as fragments of two products. The order of k within a product is free as long as W and x agree, so
//          thread t of a quad takes columns 8t to 8t + 7. Hence neither bank conflicts nor, where kWarpsN is
//          1, any barrier in the main loop.
// Flight:  two CTAs of some 100 KB for every multiprocessor, all of it on its way at the start; with a
//          programmatic launch before the kernel in front has finished, since weights depend on none.

#include <cuda_bf16.h>

#include <cstdint>

#include "model/cuda/weight_stream.h"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/mma.cuh"

namespace flash_mla::model::cuda {

namespace ptx = sm90::ptx;

/// Everything a launch needs besides WeightStream.
struct StreamGrid {
  std::int64_t row_tiles;   ///< tiles along n (with silu_mul: along n / 2)
  std::int64_t row_groups;  ///< groups of rows of x where there are no experts
  int cluster;
};

template <int kGroups_, int kTiles_, int kWarpsN_, int kWarpsK_, bool kFp32_>
struct StreamShape {
  static constexpr int kGroups = kGroups_, kTiles = kTiles_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr bool kFp32 = kFp32_;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kRows = 16 * kTiles * kWarpsN;
  static constexpr int kChunks = kTiles * 2 * (kFp32 ? 2 : 1);  ///< 16-byte pieces of W, per thread and stage
  static constexpr int kWarpBytes = kChunks * 512;
  static constexpr int kGroupBytes = kWarpsN * kWarpBytes + kGroups * 512;
  static constexpr int kStageBytes = kWarpsK * kGroupBytes;
  static constexpr int kDepth = (108 << 10) / kStageBytes > 8 ? 8 : (108 << 10) / kStageBytes;
  static_assert(kDepth >= 2 && kGroups % kWarpsN == 0);
  static constexpr int kSumStride = kRows + 4;  ///< floats; conflict-free for the accumulators' layout
  static constexpr int kSumBytes = kWarpsK * 8 * kGroups * kSumStride * 4;
  static constexpr int kSharedBytes = kDepth * kStageBytes > kSumBytes ? kDepth* kStageBytes : kSumBytes;
};

/// Eight float32 weights as three sets of bfloat16 whose sum they are (3 x 8 bits of mantissa).
__device__ __forceinline__ void split_fp32(const uint4& a, const uint4& b, uint4 (&parts)[3]) {
  float f[8] = {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
                __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)};
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    std::uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
      packed[i] = reinterpret_cast<const std::uint32_t&>(pair);
      f[2 * i] -= __low2float(pair);
      f[2 * i + 1] -= __high2float(pair);
    }
    parts[part] = {packed[0], packed[1], packed[2], packed[3]};
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

/// Four neighbouring outputs of a row, or as many as there are.
__device__ __forceinline__ void store_outputs(const WeightStream& p, std::int64_t row, std::int64_t column,
                                              std::int64_t columns, float (&v)[4]) {
  const std::int64_t at = row * p.out_stride + column;
  if (p.out_fp32) {
    float* out = static_cast<float*>(p.out) + at;
    if (column + 4 <= columns && reinterpret_cast<std::uintptr_t>(out) % 16 == 0) {
      if (p.accumulate) {
        const float4 old = *reinterpret_cast<const float4*>(out);
        v[0] += old.x, v[1] += old.y, v[2] += old.z, v[3] += old.w;
      }
      *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < columns) out[i] = p.accumulate ? out[i] + v[i] : v[i];
    }
    return;
  }
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + at;
  if (column + 4 <= columns && reinterpret_cast<std::uintptr_t>(out) % 8 == 0) {
    __nv_bfloat162 pair[2];
    if (p.accumulate) {
      *reinterpret_cast<uint2*>(pair) = *reinterpret_cast<const uint2*>(out);
      v[0] += __low2float(pair[0]), v[1] += __high2float(pair[0]);
      v[2] += __low2float(pair[1]), v[3] += __high2float(pair[1]);
    }
    pair[0] = __floats2bfloat162_rn(v[0], v[1]);
    pair[1] = __floats2bfloat162_rn(v[2], v[3]);
    *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(pair);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < columns)
      out[i] = __float2bfloat16(p.accumulate ? __bfloat162float(out[i]) + v[i] : v[i]);
  }
}

template <class Shape>
__global__ __launch_bounds__(Shape::kThreads,
                             2) void stream_weights(const __grid_constant__ WeightStream p,
                                                    const __grid_constant__ StreamGrid grid) {
  constexpr int kGroups = Shape::kGroups, kTiles = Shape::kTiles, kWarpsN = Shape::kWarpsN;
  constexpr int kWarpsK = Shape::kWarpsK, kDepth = Shape::kDepth, kRows = Shape::kRows;
  constexpr bool kFp32 = Shape::kFp32;
  constexpr int kWeightSize = kFp32 ? 4 : 2;
  constexpr int kShare = (kGroups + kWarpsN - 1) / kWarpsN;  // groups of x that a warp copies
  extern __shared__ __align__(128) std::uint8_t shared[];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;
  const int quad_row = lane / 4, quad = lane % 4;

  // Which part of the product this is.
  const int cluster = grid.cluster;
  const int rank = static_cast<int>(blockIdx.x % cluster);
  const std::int64_t part = blockIdx.x / cluster;
  const bool experts = p.units != nullptr || p.direct_ids != nullptr;
  if (!p.early_weights) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  }
  std::int64_t tile;
  ExpertUnit unit{0, 0, 0};
  if (experts) {
    const int u = static_cast<int>(part / grid.row_tiles);
    tile = part % grid.row_tiles;
    if (p.direct_ids != nullptr) {
      unit = {__ldcg(p.direct_ids + u), u, 1};
    } else {
      // From L2: a launch that is early may find an older list in L1.
      if (u >= __ldcg(p.num_units)) return;
      const int* entry = &p.units[u].expert;
      unit = {__ldcg(entry), __ldcg(entry + 1), __ldcg(entry + 2)};
    }
  } else {
    tile = part / grid.row_groups;
    unit.first = static_cast<std::int32_t>(part % grid.row_groups) * 8 * kGroups;
    const std::int64_t left = p.m - unit.first;
    unit.count = left < 8 * kGroups ? static_cast<int>(left) : 8 * kGroups;
  }

  // This CTA's blocks of 64 along k, and this warp's share of them.
  const int blocks = static_cast<int>((p.k + 63) / 64);
  const int blocks_per_rank = (blocks + cluster - 1) / cluster;
  const int first_block = rank * blocks_per_rank;
  const int own_blocks = max(0, min(blocks - first_block, blocks_per_rank));
  const int steps = own_blocks > warp_k ? 2 * ((own_blocks - warp_k + kWarpsK - 1) / kWarpsK) : 0;
  const auto column_of = [&](int step) {
    return std::int64_t(first_block + (step >> 1) * kWarpsK + warp_k) * 64 + (step & 1) * 32 + quad * 8;
  };

  // This thread's rows of W.
  const std::int64_t half = p.n / 2;
  const char* weight =
      static_cast<const char*>(p.weight) + std::int64_t(unit.expert) * p.n * p.k * kWeightSize;
  const char* rows[2 * kTiles];
  std::uint32_t row_valid = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int local = warp_n * kTiles * 16 + i * 8 + quad_row;
    std::int64_t row = tile * kRows + local;
    bool valid = row < p.n;
    if (p.silu_mul) {  // gate rows in the first half of the tile, the up rows of the same outputs in the
                       // second
      const bool up = local >= kRows / 2;
      row = tile * (kRows / 2) + local - (up ? kRows / 2 : 0);
      valid = row < half;
      if (up) row += half;
    }
    if (valid) row_valid |= 1u << i;
    rows[i] = weight + (valid ? row : 0) * p.k * kWeightSize;
  }

  const std::uint32_t ring = ptx::smem_address(shared) + warp_k * Shape::kGroupBytes;
  const std::uint32_t own_weights = ring + warp_n * Shape::kWarpBytes + lane * 16;
  const std::uint32_t own_x = ring + kWarpsN * Shape::kWarpBytes + lane * 16;
  const auto copy_weights = [&](int step, int slot) {
    const std::int64_t column = column_of(step);
    const bool inside = step < steps && column < p.k;
    const std::uint32_t to = own_weights + slot * Shape::kStageBytes;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const std::uint32_t bytes = inside && (row_valid >> i & 1) ? 16 : 0;
      const char* from = rows[i] + (inside ? column * kWeightSize : 0);
      if constexpr (kFp32) {
        ptx::cp_async_16(to + 2 * i * 512, from, bytes);
        ptx::cp_async_16(to + (2 * i + 1) * 512, from + (bytes == 0 ? 0 : 16), bytes);
      } else {
        ptx::cp_async_16(to + i * 512, from, bytes);
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kDepth - 1; ++s) {
    copy_weights(s, s);
    ptx::cp_async_commit();
  }
  if (p.early_weights) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  }

  // This thread's rows of x. The first stages come through registers: a group of copies behind those of the
  // weights would complete only after all of them.
  const auto pair_of = [&](int j) {
    return p.pairs != nullptr ? __ldcg(p.pairs + unit.first + j) : unit.first + j;
  };
  const __nv_bfloat16* x_rows[kShare];
  std::uint32_t x_valid = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int group = i * kWarpsN + warp_n, j = group * 8 + quad_row;
    x_rows[i] = static_cast<const __nv_bfloat16*>(p.x);
    if (group < kGroups && j < unit.count) {
      x_valid |= 1u << i;
      x_rows[i] += std::int64_t(pair_of(j) / p.x_divisor) * p.x_stride;
    }
  }
  {
    uint4 first[kDepth - 1][kShare];
#pragma unroll
    for (int s = 0; s < kDepth - 1; ++s) {
      const std::int64_t column = column_of(s);
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        first[s][i] = make_uint4(0, 0, 0, 0);
        if (s < steps && column < p.k && (x_valid >> i & 1)) {
          first[s][i] = __ldcg(reinterpret_cast<const uint4*>(x_rows[i] + column));
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kDepth - 1; ++s) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int group = i * kWarpsN + warp_n;
        if (group < kGroups) ptx::store_shared_16(own_x + s * Shape::kStageBytes + group * 512, first[s][i]);
      }
    }
  }

  float sums[kTiles][kGroups][4] = {};
  int slot = 0, fill = kDepth - 1;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kDepth - 2>();
    if constexpr (kWarpsN > 1) {  // others' x has arrived, and nobody reads the slot that is filled next
      asm volatile("bar.sync %0, %1;" ::"r"(warp_k + 1), "n"(kWarpsN * 32) : "memory");
    }
    copy_weights(step + kDepth - 1, fill);
    {
      const std::int64_t column = column_of(step + kDepth - 1);
      const bool inside = step + kDepth - 1 < steps && column < p.k;
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        const int group = i * kWarpsN + warp_n;
        const std::uint32_t bytes = inside && (x_valid >> i & 1) ? 16 : 0;
        if (group < kGroups) {
          ptx::cp_async_16(own_x + fill * Shape::kStageBytes + group * 512, x_rows[i] + (inside ? column : 0),
                           bytes);
        }
      }
    }
    ptx::cp_async_commit();

    uint4 b[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      b[i] = ptx::load_shared_16(own_x + slot * Shape::kStageBytes + i * 512);
    }
    const std::uint32_t from = own_weights + slot * Shape::kStageBytes;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if constexpr (kFp32) {
        uint4 low[3], high[3];
        split_fp32(ptx::load_shared_16(from + (4 * t) * 512), ptx::load_shared_16(from + (4 * t + 1) * 512),
                   low);
        split_fp32(ptx::load_shared_16(from + (4 * t + 2) * 512),
                   ptx::load_shared_16(from + (4 * t + 3) * 512), high);
#pragma unroll
        for (int part_of = 2; part_of >= 0; --part_of) {
          const uint4 lo = low[part_of], hi = high[part_of];
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            ptx::mma_m16n8k16_bf16(sums[t][i], lo.x, hi.x, lo.y, hi.y, b[i].x, b[i].y);
            ptx::mma_m16n8k16_bf16(sums[t][i], lo.z, hi.z, lo.w, hi.w, b[i].z, b[i].w);
          }
        }
      } else {
        const uint4 lo = ptx::load_shared_16(from + (2 * t) * 512);
        const uint4 hi = ptx::load_shared_16(from + (2 * t + 1) * 512);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          ptx::mma_m16n8k16_bf16(sums[t][i], lo.x, hi.x, lo.y, hi.y, b[i].x, b[i].y);
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          ptx::mma_m16n8k16_bf16(sums[t][i], lo.z, hi.z, lo.w, hi.w, b[i].z, b[i].w);
        }
      }
    }
    slot = slot + 1 == kDepth ? 0 : slot + 1;
    fill = fill + 1 == kDepth ? 0 : fill + 1;
  }

  // The ring's memory now holds the sums: [k group][row of x][row of W].
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared);
  constexpr int kStride = Shape::kSumStride, kPlane = 8 * kGroups * kStride;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float* to =
          partial + warp_k * kPlane + (i * 8 + quad * 2) * kStride + (warp_n * kTiles + t) * 16 + quad_row;
      to[0] = sums[t][i][0];
      to[kStride] = sums[t][i][1];
      to[8] = sums[t][i][2];
      to[kStride + 8] = sums[t][i][3];
    }
  }
  __syncthreads();
  if constexpr (kWarpsK > 1) {
    for (int i = threadIdx.x; i < unit.count * (kRows / 4); i += Shape::kThreads) {
      float* at = partial + (i / (kRows / 4)) * kStride + i % (kRows / 4) * 4;
      float4 sum = *reinterpret_cast<float4*>(at);
#pragma unroll
      for (int w = 1; w < kWarpsK; ++w) {
        const float4 v = *reinterpret_cast<float4*>(at + w * kPlane);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      *reinterpret_cast<float4*>(at) = sum;
    }
  }
  if (cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  // Four outputs at a time, the CTAs of the cluster in turn.
  const auto total = [&](int row, int column) {
    float* at = partial + row * kStride + column;
    if (cluster == 1) return *reinterpret_cast<float4*>(at);
    float4 sum = ptx::load_cluster_16(ptx::smem_address(at), 0);
    for (int r = 1; r < cluster; ++r) {
      const float4 v = ptx::load_cluster_16(ptx::smem_address(at), r);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
  };
  const int width = p.silu_mul ? kRows / 2 : kRows;
  const std::int64_t columns = p.silu_mul ? half : p.n;
  for (int i = rank * Shape::kThreads + threadIdx.x; i < unit.count * (width / 4);
       i += cluster * Shape::kThreads) {
    const int row = i / (width / 4), local = i % (width / 4) * 4;
    const std::int64_t column = tile * width + local;
    if (column >= columns) continue;
    const float4 sum = total(row, local);
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    if (p.bias != nullptr) {
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] += column + c < columns ? p.bias[column + c] : 0.0f;
    }
    if (p.silu_mul) {
      const float4 sum_up = total(row, local + kRows / 2);
      float up[4] = {sum_up.x, sum_up.y, sum_up.z, sum_up.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (p.bias != nullptr && column + c < columns) up[c] += p.bias[half + column + c];
        v[c] = silu(v[c]) * up[c];
      }
    }
    store_outputs(p, pair_of(row), column, columns, v);
  }
  if (cluster > 1) {  // nobody leaves while others read its sums
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace flash_mla::model::cuda
