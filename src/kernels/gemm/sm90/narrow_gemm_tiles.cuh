#pragma once

// Of narrow_gemm.cuh: shapes, memory, and which tiles a CTA takes.

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/narrow_gemm.h"

namespace flash_mla::sm90::narrow {

constexpr int kStepK = 128, kBlockRows = 64;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup, kWarps = 8;  // warps that multiply
constexpr float kLargest = 448.0f, kLeastScale = 1.17549435e-38f;

enum class Kind { kW4A8, kW4A16, kW8A16 };

/// kRows: of x, at most; kSilu: silu of the result, for the next product.
template <int kRows_, bool kSilu_, Kind kKind>
struct Config {
  static constexpr int kRows = kRows_;
  static constexpr bool kSilu = kSilu_;
  static constexpr bool kBf16 = kKind != Kind::kW4A8;   // x
  static constexpr bool kE4m3 = kKind == Kind::kW8A16;  // weights
  /// Of 64 rows of W and 128 columns; int4: two rows in 128 bytes.
  static constexpr int kBlockBytes = (kE4m3 ? kBlockRows : kBlockRows / 2) * kStepK;
  static constexpr int kOutputs = kSilu ? 128 : 256;
  static constexpr int kSums = kRows / 2;                     // of a thread, of 64 rows of W
  static constexpr int kGroups = kRows / 8;                   // of 8 rows of x
  static constexpr int kRowBytes = kStepK * (kBf16 ? 2 : 1);  // of x, in a stage
  static constexpr int kStageBytes = 4 * kBlockBytes + kRows * kRowBytes + 4 * kBlockRows * 4 + 2 * kRows * 4;
  static constexpr int kStages = (208 << 10) / kStageBytes;
};

struct Params {
  /// Of 16 bits: e4m3 (k / 2, n, experts), int4 (k / 2, n / 2, experts), of which 64 are 128 columns of two rows.
  CUtensorMap weight_map;
  NarrowGemm gemm;
  int steps, column_tiles, dense_units;
};

template <class C>
struct Shared {
  /// By place_of; in the 128-byte swizzle of the copy engine.
  alignas(1024) std::uint8_t weights[C::kStages][4][C::kBlockBytes];
  /// In the swizzle of wgmma; bfloat16: 64 columns of all rows, then the others.
  alignas(1024) std::uint8_t x[C::kStages][C::kRows * C::kRowBytes];
  alignas(16) float weight_scales[C::kStages][4][kBlockRows];
  alignas(16) float x_scales[C::kStages][C::kRows], x_offsets[C::kStages][C::kRows];
  std::uint64_t full[C::kStages], empty[C::kStages];
  // Of W4A8, by the tile's parity.
  float highest[2][kWarps][C::kRows], code_sums[2][kWarps][C::kRows];
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

/// Where a warpgroup's block is among a stage's four: every two that follow each other in W are copied together.
template <class C>
constexpr int place_of(int group, int block) {
  return C::kSilu ? 2 * block + group : 2 * group + block;
}
/// The two blocks from place 2 `pair` on.
template <class C>
__device__ __forceinline__ Block pair_of(const Params& p, const Tile& tile, int pair) {
  const Block first = C::kSilu ? block_of<C>(p, tile, 0, pair) : block_of<C>(p, tile, pair, 0);
  const Block second = C::kSilu ? block_of<C>(p, tile, 1, pair) : block_of<C>(p, tile, pair, 1);
  return {first.row, first.count + second.count};
}

/// Of the 16 rows of W that a warp multiplies, the first of the two neighbours that a lane has the results of, as rows lane / 4
/// and lane / 4 + 8 of the product. e4m3: lanes that read at the same time have rows 4 apart, which lie in different banks.
template <class C>
__device__ __forceinline__ int row_of(int lane) {
  const int g = lane / 4;
  return C::kE4m3 ? g % 2 * 4 + g / 2 % 2 * 2 + g / 4 * 8 : 2 * g;
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

}  // namespace flash_mla::sm90::narrow
