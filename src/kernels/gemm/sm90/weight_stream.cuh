#pragma once

// out^T = W x^T with the weights streamed through shared memory once.
//
// Item:    up to kWarpsN * kTiles * 16 rows of W by all of the CTA's k, for 8 * kGroups rows of x. The
//          weights are the 16-row operand of mma.m16n8k16, so that few rows of x waste little. A CTA goes
//          from item to item and its copies run ahead across them.
// Threads: kWarpsN x kWarpsK warps. Warps of one k group share its x; k groups take turns at blocks of 64
//          along k and are summed in order at the end, then the CTAs of a cluster in order of rank. No
//          atomics.
// Memory:  a ring of kDepth stages; a stage is 32 columns of k for every k group. Its layout is that of the
//          registers: a thread copies 16 bytes (8 columns) of a row of W to its own place and reads them back
//          as fragments of two products. The order of k within a product is free as long as W and x agree, so
//          thread t of a quad takes columns 8t to 8t + 7. Hence neither bank conflicts nor, where kWarpsN is
//          1, any barrier in the main loop. Behind the ring: the sums, [plane][row of x][row of W].
//          e4m3: 16 bytes are 16 columns, so a stage is 64 of them, two pieces of x and a scale for every 8 rows,
//          which a lane each copies; the sums of 32 columns are scaled before they are added.
//          int4: 16 bytes are 16 columns of two neighbouring rows, which are rows r and r + 8 of a product; a scale for
//          every row.
// Registers: 95 to 242 a thread by shape; two CTAs fit on a multiprocessor.
// Flight:  some 100 KB for every CTA, all of it on its way at the start. One CTA leaves room for one of the
//          next kernel, whose weights then come in while this one ends (programmatic launch): weights depend
//          on none.

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/gemm/sm90/weight_stream.h"
#include "kernels/gemm/sm90/weight_stream_sums.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/rows/sm90/silu.cuh"

namespace flash_mla::sm90 {

/// Everything a launch needs besides WeightStream.
struct StreamGrid {
  std::int64_t row_tiles;   ///< items along n (with silu_mul: along n / 2)
  std::int64_t row_groups;  ///< groups of rows of x where there are no experts
  int width;                ///< outputs of an item along n
  int cluster;
};

template <int kGroups_, int kTiles_, int kWarpsN_, int kWarpsK_, StreamWeight kWeight>
struct StreamShape {
  static constexpr int kGroups = kGroups_, kTiles = kTiles_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr bool kFp32 = kWeight == StreamWeight::kFp32, kE4m3 = kWeight == StreamWeight::kE4m3;
  static constexpr bool kInt4 = kWeight == StreamWeight::kInt4;
  static constexpr int kHalves =
      kE4m3 || kInt4 ? 2 : 1;                    ///< 16-byte pieces of x, per thread, group and stage
  static constexpr int kColumns = 32 * kHalves;  ///< of a stage, for every k group
  /// A scale for every 8 rows of a warp, of int4 for every row.
  static constexpr int kScaleBytes = kInt4 ? 64 * kTiles : kE4m3 ? 32 : 0;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kRows = 16 * kTiles * kWarpsN;
  static_assert(!kE4m3 || 2 * kTiles * 4 <= 32);
  static_assert(!kInt4 || 4 * kTiles <= 32);                   // lanes that copy scales
  static constexpr int kPieces = kInt4 ? kTiles : 2 * kTiles;  ///< places in W that a thread copies from
  static constexpr int kChunks = kPieces * (kFp32 ? 2 : 1);    ///< 16-byte pieces of W, per thread and stage
  static constexpr int kWarpBytes = kChunks * 512;
  static constexpr int kGroupBytes = kWarpsN * (kWarpBytes + kScaleBytes) + kGroups * kHalves * 512;
  static constexpr int kStageBytes = kWarpsK * kGroupBytes;
  static constexpr int kSumStride = kRows + 4;  ///< floats; conflict-free for the accumulators' layout
  static constexpr int kPlane = 8 * kGroups * kSumStride;
  static constexpr int kPlanes = kGroups <= 2 ? kWarpsK : 1;
  static constexpr int kSumBytes = kPlanes * kPlane * 4;
  static constexpr int kFit = ((112 << 10) - kSumBytes) / kStageBytes;
  static constexpr int kDepth = kFit > 16 ? 16 : kFit;
  static_assert(kDepth >= 2 && kGroups % kWarpsN == 0);
  static constexpr int kSharedBytes = kDepth * kStageBytes + kSumBytes;
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

/// What an item is.
struct StreamItem {
  std::int64_t tile;
  ExpertUnit unit;
};

__device__ __forceinline__ StreamItem stream_item(const WeightStream& p, const StreamGrid& grid, int rows,
                                                  std::int64_t index) {
  if (p.direct_ids != nullptr) {
    const int u = static_cast<int>(index / grid.row_tiles);
    return {index % grid.row_tiles, {__ldcg(p.direct_ids + u), u, 1}};
  }
  if (p.units != nullptr) {
    // From L2: a launch that is early may find an older list in L1.
    const int* entry = &p.units[index / grid.row_tiles].expert;
    return {index % grid.row_tiles, {__ldcg(entry), __ldcg(entry + 1), __ldcg(entry + 2)}};
  }
  const std::int64_t first = index % grid.row_groups * rows;
  return {
      index / grid.row_groups,
      {0, static_cast<std::int32_t>(first), static_cast<std::int32_t>(min(p.m - first, std::int64_t(rows)))}};
}

template <class Shape>
__global__ __launch_bounds__(Shape::kThreads,
                             2) void stream_weights(const __grid_constant__ WeightStream p,
                                                    const __grid_constant__ StreamGrid grid) {
  constexpr int kGroups = Shape::kGroups, kTiles = Shape::kTiles, kWarpsN = Shape::kWarpsN;
  constexpr int kWarpsK = Shape::kWarpsK, kDepth = Shape::kDepth, kRows = Shape::kRows;
  constexpr bool kFp32 = Shape::kFp32;
  constexpr bool kE4m3 = Shape::kE4m3, kInt4 = Shape::kInt4;
  // Bytes from column to column; in int4 of two rows together.
  constexpr int kWeightSize = kFp32 ? 4 : kE4m3 || kInt4 ? 1 : 2;
  constexpr int kPieces = Shape::kPieces;
  constexpr int kHalves = Shape::kHalves;
  constexpr int kShare = kGroups / kWarpsN;  // groups of x that a warp copies
  extern __shared__ __align__(128) std::uint8_t shared[];

  const StreamThread<Shape> thread;
  const int lane = thread.lane, warp_n = thread.warp_n, warp_k = thread.warp_k;
  const int quad_row = thread.quad_row, quad = thread.quad;
  const int cluster = grid.cluster;
  const int rank = static_cast<int>(blockIdx.x % cluster);
  const std::int64_t stride = gridDim.x / cluster;
  if (!p.early_weights) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  }
  std::int64_t items = grid.row_tiles * (p.direct_ids != nullptr ? p.max_units : grid.row_groups);
  if (p.units != nullptr) items = grid.row_tiles * __ldcg(p.num_units);

  // This CTA's blocks of 64 along k, and this warp's share of them.
  const int blocks = static_cast<int>((p.k + 63) / 64);
  const int blocks_per_rank = (blocks + cluster - 1) / cluster;
  const int first_block = rank * blocks_per_rank;
  const int own_blocks = max(0, min(blocks - first_block, blocks_per_rank));
  constexpr int kStepsPerBlock = 64 / Shape::kColumns;
  const int steps =
      own_blocks > warp_k ? kStepsPerBlock * ((own_blocks - warp_k + kWarpsK - 1) / kWarpsK) : 0;
  const auto column_of = [&](int step) {
    return std::int64_t(first_block + step / kStepsPerBlock * kWarpsK + warp_k) * 64 +
           step % kStepsPerBlock * 32 + quad * 8 * kHalves;
  };

  // What this thread copies: the cursor is ahead of the products by up to kDepth - 1 steps. Lambdas, since as
  // a class of their own they compile to up to 7% more instructions.
  std::int64_t copy_item = blockIdx.x / cluster;
  int copy_step = 0, fill = 0;
  const char* rows[kPieces];
  // Of the 8 rows that this lane copies the scale of, lane < 2 * kTiles; int4: the 4 rows, lane < 4 * kTiles.
  const float* scale_row = p.scales;
  bool scale_valid = false;
  const std::int64_t scale_columns = (p.k + 127) / 128;
  const __nv_bfloat16* x_rows[kShare];
  std::uint32_t row_valid = 0, x_valid = 0;
  const std::int64_t half = p.n / 2;
  const auto pair_of = [&](const ExpertUnit& unit, int j) {
    return p.pairs != nullptr ? __ldcg(p.pairs + unit.first + j) : unit.first + j;
  };
  const auto point_at_weights = [&](const StreamItem& item) {
    const auto bytes_of = [&](std::int64_t row) { return row * p.k * kWeightSize / (kInt4 ? 2 : 1); };
    const char* weight = static_cast<const char*>(p.weight) + bytes_of(std::int64_t(item.unit.expert) * p.n);
    row_valid = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int local = warp_n * kTiles * 16 + (kInt4 ? i * 16 + quad_row * 2 : i * 8 + quad_row);
      // With silu_mul gate rows are in the first half of the tile, the up rows of the same outputs in the
      // second.
      const bool up = p.silu_mul && local >= kRows / 2;
      if (up) local -= kRows / 2;
      const std::int64_t row = item.tile * grid.width + local;
      const bool valid = local < grid.width && row < (p.silu_mul ? half : p.n);
      if (valid) row_valid |= 1u << i;
      rows[i] = weight + bytes_of(valid ? row + (up ? half : 0) : 0);
    }
  };
  const auto point_at_scales = [&](const StreamItem& item) {
    if constexpr (kE4m3 || kInt4) {
      constexpr int kRowsOfLane = kInt4 ? 4 : 8;
      int local = warp_n * kTiles * 16 + lane * kRowsOfLane;
      const bool up = p.silu_mul && local >= kRows / 2;
      if (up) local -= kRows / 2;
      const std::int64_t row = item.tile * grid.width + local;
      scale_valid = lane < 16 / kRowsOfLane * kTiles && local < grid.width && row < (p.silu_mul ? half : p.n);
      if (!scale_valid) return;
      const std::int64_t row_of_all = row + (up ? half : 0), expert = item.unit.expert;
      scale_row = p.scales + (kInt4 ? expert * scale_columns * p.n + row_of_all
                                    : (expert * ((p.n + 7) / 8) + row_of_all / 8) * scale_columns);
    }
  };
  const auto point_at_x = [&](const StreamItem& item) {
    x_valid = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int j = (i * kWarpsN + warp_n) * 8 + quad_row;
      x_rows[i] = static_cast<const __nv_bfloat16*>(p.x);
      if (j < item.unit.count) {
        x_valid |= 1u << i;
        x_rows[i] += std::int64_t(pair_of(item.unit, j) / p.x_divisor) * p.x_stride;
      }
    }
  };

  const int own_weights = warp_k * Shape::kGroupBytes + warp_n * Shape::kWarpBytes + lane * 16;
  const int own_x = warp_k * Shape::kGroupBytes + kWarpsN * Shape::kWarpBytes + lane * 16;
  const int own_scales = warp_k * Shape::kGroupBytes + kWarpsN * Shape::kWarpBytes + kGroups * kHalves * 512 +
                         warp_n * Shape::kScaleBytes;
  const std::uint32_t ring = ptx::smem_address(shared);
  const auto copy_weights = [&] {
    const std::int64_t column = column_of(copy_step);
    const bool inside = column < p.k;
    const std::uint32_t to = ring + own_weights + fill * Shape::kStageBytes;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const bool valid = inside && (row_valid >> i & 1);
      const std::uint32_t bytes = valid ? 16 : 0;
      const char* from = rows[i] + (valid ? column * kWeightSize : 0);
      if constexpr (kFp32) {
        ptx::cp_async_16(to + 2 * i * 512, from, bytes);
        ptx::cp_async_16(to + (2 * i + 1) * 512, from + bytes, bytes);
      } else {
        ptx::cp_async_16(to + i * 512, from, bytes);
      }
    }
    if constexpr (kE4m3) {
      if (lane < 2 * kTiles) {
        const bool valid = scale_valid && column - quad * 16 < p.k;
        ptx::cp_async_4(ring + own_scales + fill * Shape::kStageBytes + lane * 4,
                        scale_row + (valid ? column / 128 : 0), valid ? 4 : 0);
      }
    }
    if constexpr (kInt4) {
      if (lane < 4 * kTiles) {
        const bool valid = scale_valid && column - quad * 16 < p.k;
        ptx::cp_async_16(ring + own_scales + fill * Shape::kStageBytes + lane * 16,
                         scale_row + (valid ? column / 128 * p.n : 0), valid ? 16 : 0);
      }
    }
  };
  const auto copy_x = [&] {
    const std::int64_t column = column_of(copy_step);
#pragma unroll
    for (int i = 0; i < kShare * kHalves; ++i) {
      const int group = i / kHalves, piece = i % kHalves;
      const bool valid = column < p.k && (x_valid >> group & 1);
      ptx::cp_async_16(
          ring + own_x + fill * Shape::kStageBytes + (piece * kGroups + group * kWarpsN + warp_n) * 512,
          x_rows[group] + (valid ? column + piece * 8 : 0), valid ? 16 : 0);
    }
  };
  const auto advance = [&] {
    ptx::cp_async_commit();
    fill = fill + 1 == kDepth ? 0 : fill + 1;
    if (++copy_step < steps) return;
    copy_step = 0;
    copy_item += stride;
    if (copy_item < items) {
      const StreamItem next = stream_item(p, grid, 8 * kGroups, copy_item);
      point_at_weights(next);
      point_at_scales(next);
      point_at_x(next);
    }
  };
  const auto copy = [&] {
    if (copy_item < items) {
      copy_weights();
      copy_x();
      advance();
    } else {
      ptx::cp_async_commit();
    }
  };

  if (steps > 0) {
    // The weights of the first item before anything else. Its x comes through registers: a group of copies
    // behind those of the weights would complete only after all of them.
    const bool any = copy_item < items;
    StreamItem first{};
    if (any) {
      first = stream_item(p, grid, 8 * kGroups, copy_item);
      point_at_weights(first);
      point_at_scales(first);
    }
    const int early = any ? min(steps, kDepth - 1) : 0;
    for (; fill < early; ++fill, ++copy_step) {
      copy_weights();
      ptx::cp_async_commit();
    }
    if (p.early_weights) {
      ptx::grid_dependency_wait();
      ptx::grid_dependency_launch();
    }
    if (any) point_at_x(first);
    uint4 x_early[kDepth - 1][kShare * kHalves];
#pragma unroll
    for (int s = 0; s < kDepth - 1; ++s) {
      const std::int64_t column = column_of(s);
#pragma unroll
      for (int i = 0; i < kShare * kHalves; ++i) {
        x_early[s][i] = make_uint4(0, 0, 0, 0);
        if (s < early && column < p.k && (x_valid >> i / kHalves & 1)) {
          x_early[s][i] =
              __ldcg(reinterpret_cast<const uint4*>(x_rows[i / kHalves] + column + i % kHalves * 8));
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kDepth - 1; ++s) {
      if (s < early) {
#pragma unroll
        for (int i = 0; i < kShare * kHalves; ++i) {
          const int at = i % kHalves * kGroups + i / kHalves * kWarpsN + warp_n;
          *reinterpret_cast<uint4*>(shared + own_x + s * Shape::kStageBytes + at * 512) = x_early[s][i];
        }
      }
    }
    if (any && copy_step == steps) {
      copy_step = 0;
      copy_item += stride;
      if (copy_item < items) {
        const StreamItem next = stream_item(p, grid, 8 * kGroups, copy_item);
        point_at_weights(next);
        point_at_scales(next);
        point_at_x(next);
      }
    }
    for (int s = early; s < kDepth - 1; ++s) copy();
  } else if (p.early_weights) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  }
  fill = kDepth - 1;  // whether or not there was something for every stage

  float* const partial = reinterpret_cast<float*>(shared + kDepth * Shape::kStageBytes);
  constexpr int kStride = Shape::kSumStride;
  const int width = grid.width;
  const std::int64_t columns = p.silu_mul ? half : p.n;
  int slot = 0;
  for (std::int64_t index = blockIdx.x / cluster; index < items; index += stride) {
    float sums[kTiles][kGroups][4] = {};
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kDepth - 2>();
      if constexpr (kWarpsN > 1) {  // others' x has arrived, and nobody reads the slot that is filled next
        ptx::named_barrier_sync<kWarpsN * 32>(warp_k + 1);
      } else if constexpr (kE4m3 || kInt4) {  // the same of other lanes' scales
        __syncwarp();
      }
      copy();

      const std::uint8_t* const stage = shared + slot * Shape::kStageBytes;
      const auto weights_at = [&](int i) {
        return *reinterpret_cast<const uint4*>(stage + own_weights + i * 512);
      };
      const auto x_at = [&](int piece, uint4(&b)[kGroups]) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
          b[i] = *reinterpret_cast<const uint4*>(stage + own_x + (piece * kGroups + i) * 512);
      };
      uint4 b[kGroups];
      if constexpr (kE4m3) {
        const auto* scales = reinterpret_cast<const float*>(stage + own_scales);
        const auto codes_at = [&](int i, int piece) {
          return *reinterpret_cast<const uint2*>(stage + own_weights + i * 512 + piece * 8);
        };
#pragma unroll
        for (int piece = 0; piece < kHalves; ++piece) {
          x_at(piece, b);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            multiply_tile(codes_at(2 * t, piece), codes_at(2 * t + 1, piece), b, scales[2 * t],
                          scales[2 * t + 1], sums[t]);
          }
        }
      } else if constexpr (kInt4) {
        const auto* scales = reinterpret_cast<const float2*>(stage + own_scales) + quad_row;
#pragma unroll
        for (int piece = 0; piece < kHalves; ++piece) {
          x_at(piece, b);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            multiply_int4_tile(*reinterpret_cast<const uint2*>(stage + own_weights + t * 512 + piece * 8), b,
                               scales[8 * t], sums[t]);
          }
        }
      } else {
        x_at(0, b);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if constexpr (kFp32) {
            uint4 low[3], high[3];
            split_fp32(weights_at(4 * t), weights_at(4 * t + 1), low);
            split_fp32(weights_at(4 * t + 2), weights_at(4 * t + 3), high);
            multiply_tile(low, high, b, sums[t]);
          } else {
            const uint4 lo = weights_at(2 * t), hi = weights_at(2 * t + 1);
            multiply_tile(lo, hi, b, sums[t]);
          }
        }
      }
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }

    // The k groups' sums, one after the other: in planes of their own where those are small, else in turn.
    const StreamItem item = stream_item(p, grid, 8 * kGroups, index);
    add_up<Shape>(thread, sums, partial, item.unit.count);
    sync_cluster(cluster);

    // Four outputs at a time, the CTAs of the cluster in turn.
    const auto total = [&](int row, int column) {
      return total_of(partial + row * kStride + column, cluster);
    };
    for (int i = rank * Shape::kThreads + threadIdx.x; i < item.unit.count * (width / 4);
         i += cluster * Shape::kThreads) {
      const int row = i / (width / 4), local = i % (width / 4) * 4;
      const std::int64_t column = item.tile * width + local;
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
      store_outputs(p, pair_of(item.unit, row), column, columns, v);
    }
    // Nobody overwrites or leaves while others read these sums.
    sync_cluster_readers(cluster);
  }
}

}  // namespace flash_mla::sm90
