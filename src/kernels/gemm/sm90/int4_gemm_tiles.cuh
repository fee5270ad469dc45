#pragma once

// Of int4_gemm.cuh: shapes, memory, and which tiles a CTA takes.

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/int4_gemm.h"

namespace flash_mla::sm90::int4 {

constexpr int kStepK = 128, kBlockRows = 64, kBoxRows = kBlockRows / 2;  // a box: two rows in 128 bytes
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup, kWarps = 8;   // warps that multiply
constexpr int kBoxBytes = kBoxRows * kStepK, kWeightBytes = 4 * kBoxBytes;
constexpr float kLargest = 448.0f, kLeastScale = 1.17549435e-38f;

/// kRows: of x, at most; kSilu: silu of the result, for the next product; kBf16: x is bfloat16.
template <int kRows_, bool kSilu_, bool kBf16_ = false>
struct Config {
  static constexpr int kRows = kRows_;
  static constexpr bool kSilu = kSilu_, kBf16 = kBf16_;
  static constexpr int kOutputs = kSilu ? 128 : 256;
  static constexpr int kSums = kRows / 2;                     // of a thread, of 64 rows of W
  static constexpr int kGroups = kRows / 8;                   // of 8 rows of x
  static constexpr int kRowBytes = kStepK * (kBf16 ? 2 : 1);  // of x, in a stage
  static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes + 4 * kBlockRows * 4 + 2 * kRows * 4;
  static constexpr int kStages = (208 << 10) / kStageBytes;
};

struct Params {
  CUtensorMap weight_map;  // (k / 2, n / 2, experts) of 16 bits: 64 of them are 128 columns of two rows
  Int4Gemm gemm;
  int steps, column_tiles, dense_units;
};

template <class C>
struct Shared {
  /// Of warpgroup g and block b, by [2 g + b]; in the 128-byte swizzle of the copy engine.
  alignas(1024) std::uint8_t weights[C::kStages][4][kBoxBytes];
  /// In the swizzle of wgmma; bfloat16: 64 columns of all rows, then the others.
  alignas(1024) std::uint8_t x[C::kStages][C::kRows * C::kRowBytes];
  alignas(16) float weight_scales[C::kStages][4][kBlockRows];
  alignas(16) float x_scales[C::kStages][C::kRows], x_offsets[C::kStages][C::kRows];
  std::uint64_t full[C::kStages], empty[C::kStages];
  float highest[2][kWarps][C::kRows], code_sums[2][kWarps][C::kRows];  // by the tile's parity
};

struct Tile {
  ExpertUnit unit;
  int column;  // first output
};

/// The tiles of a CTA, in turn; those of `kGroup` units are walked together, so that they meet in L2.
template <class C>
struct Walk {
  static constexpr int kGroup = 16;
  const Params& p;
  int units, index, stride;

  __device__ explicit Walk(const Params& params)
      : p(params),
        units(params.gemm.units != nullptr ? __ldcg(params.gemm.num_units) : params.dense_units),
        index(static_cast<int>(blockIdx.x)),
        stride(static_cast<int>(gridDim.x)) {}

  __device__ bool done() const { return index >= units * p.column_tiles; }
  __device__ void next() { index += stride; }

  __device__ Tile tile() const {
    const int first = index / (kGroup * p.column_tiles) * kGroup, rest = index - first * p.column_tiles;
    const int size = min(kGroup, units - first);
    const int u = first + rest % size;
    Tile t;
    t.column = rest / size * C::kOutputs;
    if (p.gemm.units != nullptr) {
      const int* const unit = &p.gemm.units[u].expert;
      t.unit = {__ldcg(unit), __ldcg(unit + 1), __ldcg(unit + 2)};
    } else {
      const int row = u * C::kRows;
      t.unit = {0, row, min(C::kRows, static_cast<int>(p.gemm.m) - row)};
    }
    return t;
  }
};

/// The first of the 64 rows of W that warpgroup `group` multiplies as its block `block`, and how many of them there are.
struct Block {
  int row, count;
};
template <class C>
__device__ __forceinline__ Block block_of(const Params& p, const Tile& tile, int group, int block) {
  const int outputs = static_cast<int>(C::kSilu ? p.gemm.n / 2 : p.gemm.n);
  const int output = tile.column + (C::kSilu ? group : 2 * group + block) * kBlockRows;
  return {output + (C::kSilu && block == 1 ? outputs : 0), min(max(outputs - output, 0), kBlockRows)};
}

/// A place in the ring of stages.
template <class C>
struct Ring {
  int slot = 0;
  std::uint32_t round = 0;

  __device__ void next() {
    if (++slot == C::kStages) {
      slot = 0;
      ++round;
    }
  }
};

}  // namespace flash_mla::sm90::int4
