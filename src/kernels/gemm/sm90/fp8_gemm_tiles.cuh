#pragma once

// Of fp8_gemm.cuh: shapes, memory, and which tiles a CTA takes.

#include <cuda.h>

#include <cstdint>

#include "kernels/gemm/sm90/fp8_gemm.h"
#include "kernels/ptx/fragment.cuh"

namespace flash_mla::sm90::fp8 {

constexpr int kRows = 128, kStepK = 128, kBoxRows = 64;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr int kBoxBytes = kBoxRows * kStepK, kBytesA = kRows * kStepK;
constexpr float kLargest = 448.0f, kLeastScale = 1.17549435e-38f;

/// kColumns 256 or 128; kSilu: silu and quantisation of the result; kBlocks: whole_blocks.
template <int kColumns_, bool kGather_, bool kSilu_, bool kBlocks_>
struct Config {
  static constexpr int kColumns = kColumns_;
  static constexpr bool kGather = kGather_, kSilu = kSilu_, kBlocks = kBlocks_;
  static constexpr int kStages = kColumns == 256 ? 4 : 6;
  static constexpr int kStageBytes = kBytesA + kColumns * kStepK;
  static constexpr int kOwnColumns = kColumns / 2;  // of a warpgroup
  static constexpr int kSums = kOwnColumns / 2;     // of a thread, of 64 rows
  static constexpr int kGroups = kOwnColumns / 8;   // columns with scales of their own
  static_assert(!kSilu || kColumns == 256);
};

struct Params {
  CUtensorMap x_map;       // (k / 2, rows) of 16 bits
  CUtensorMap weight_map;  // (k / 2, n, experts)
  Fp8Gemm gemm;
  int steps, column_tiles, dense_units;
  std::uint32_t scale_columns, scale_rows;  // of a matrix of the weights
};

template <class C>
struct Shared {
  alignas(1024) std::uint8_t stages[C::kStages][C::kStageBytes];
  std::uint64_t full[C::kStages], empty[C::kStages];
  float highest[2][2][kRows];  // of a row, by tile's parity and warpgroup
};

struct Tile {
  ExpertUnit unit;
  int column;  // first output
};

/// The tiles of a CTA, in turn.
template <class C>
struct Walk {
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
    const int group = p.gemm.tiles.group;
    const int first = index / (group * p.column_tiles) * group, rest = index - first * p.column_tiles;
    const int size = min(group, units - first);
    const int u = first + rest % size;
    Tile t;
    t.column = rest / size * (C::kSilu ? C::kColumns / 2 : C::kColumns);
    if (p.gemm.units != nullptr) {
      const int* const unit = &p.gemm.units[u].expert;
      t.unit = {__ldcg(unit), __ldcg(unit + 1), __ldcg(unit + 2)};
    } else {
      const int row = u * kRows;
      t.unit = {0, row, min(kRows, static_cast<int>(p.gemm.m) - row)};
    }
    return t;
  }
};

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

}  // namespace flash_mla::sm90::fp8
