#pragma once

// Products of many rows in FP8: e4m3 activations with a scale for every row and 128 columns, e4m3 weights with one for
// every 8 (or 128) rows and 128 columns. One matrix, or one for each expert.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/gemm/sm90/weight_stream.h"

namespace flash_mla::sm90 {

/// How a product is cut. All of them give the same bits.
struct Fp8Tiles {
  int columns = 256;   ///< of a tile: 256, or 128 where there are few tiles
  int group = 16;      ///< tiles below each other that are walked together, so that they meet in L2
  bool turns = false;  ///< the two halves of a tile take the tensor cores in turns
};

/// out[i, j] (= or +=) sum over blocks b of 128 columns of
///   x_scales[i, b] * weight_scales[j / 8, b] * (sum over k in b of x[i, k] * weight[j, k]),
/// the inner sums on the tensor cores, the outer in fp32 and in order: a row's bits depend on nothing else.
///
/// Experts: `units` says which rows meet which matrix. A position, in the order of the units, reads row pairs[position] /
/// x_divisor of x (with `gather`; else row `position`) and writes row pairs[position] of out (with `scatter`; else row
/// `position`).
struct Fp8Gemm {
  const void* x = nullptr;               ///< (rows, k) e4m3, rows x_stride bytes apart
  std::int64_t x_stride = 0;             ///< divisible by 16
  const float* x_scales = nullptr;       ///< (rows, ceil(k / 128)), dense
  const void* weight = nullptr;          ///< (experts, n, k) e4m3, dense
  const float* weight_scales = nullptr;  ///< (experts, ceil(n / 8), ceil(k / 128)), dense
  /// The 16 scales of every 128 rows of a matrix are alike (with silu_quantise of each half's): quicker.
  bool whole_blocks = false;
  std::int64_t m = 0, n = 0, k = 0, experts = 1;  ///< m: rows, or positions of all experts
  std::int64_t x_rows = 0;                        ///< rows that x has

  const ExpertUnit* units = nullptr;        ///< of at most 128 positions each; or null: one matrix
  const std::int32_t* num_units = nullptr;  ///< on the device
  std::int64_t max_units = 0;
  const std::int32_t* pairs = nullptr;
  int x_divisor = 1;
  bool gather = false, scatter = false;

  void* out = nullptr;          ///< (m, n) bfloat16 or, with out_fp32, float32; or what silu_quantise says
  std::int64_t out_stride = 0;  ///< elements
  bool out_fp32 = false, accumulate = false;
  /// `weight` is [gate; up], n / 2 rows each: out is silu(gate) * up, (m, n / 2) in e4m3, dense, with out_scales (m,
  /// ceil(n / 2 / 128)) of every row and 128 columns: what the next product takes.
  bool silu_quantise = false;
  float* out_scales = nullptr;

  Fp8Tiles tiles;
  bool programmatic_launch = false;
};

/// Whether fp8_gemm() takes it: k divisible by 16, n by 8 (with silu_quantise 32), rows of 16 bytes.
bool fits_fp8_gemm(const Fp8Gemm& args);
/// Tiles for a product of that many rows on average for each of its matrices.
Fp8Tiles plan_fp8_gemm(std::int64_t rows, std::int64_t n, std::int64_t experts, bool silu_quantise,
                       int num_sms);

/// Queues the product: no allocation, no synchronisation; may be captured in a CUDA graph. Returns cudaErrorInvalidValue
/// for what fits_fp8_gemm() refuses.
cudaError_t fp8_gemm(const Fp8Gemm& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
