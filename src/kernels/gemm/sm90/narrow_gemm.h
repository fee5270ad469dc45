#pragma once

// Experts' products by narrow weights: W4A16, int4 as int4_weights.h lays them out and activations in bfloat16; W4A8, the
// activations in e4m3 with a scale for every row and 128 columns; W8A16, weights in e4m3. The weights are read as they are and expanded in registers, so that up to some 64 rows
// of an expert a product takes the time of reading them.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/gemm/sm90/weight_stream.h"

namespace flash_mla::sm90 {

/// Where the kernel expects column 0 to 127 of a block of activations, so that a thread finds what meets the codes that it
/// holds (narrow_gemm.cuh): the codes of x are stored in this order.
constexpr int int4_order(int column) {
  const int quad = column / 32, product = column % 32 / 8, c = column % 8;
  return 32 * product + (c & 2) / 2 * 16 + 4 * quad + c % 2 * 2 + c / 4;
}

/// out[i, j] = sum over blocks b of 128 columns of weight_scales[b, j] * x_scales[i, b] * (sum over k in b of x[i, k] *
/// (code[j, k] - 8)), the inner sums on the tensor cores, the outer in fp32 and in order: a row's bits depend on nothing else.
/// W4A16: without x_scales; W8A16: code[j, k] for code - 8 and weight_scales[j / 8, b].
///
/// Experts, positions and pairs as in Fp8Gemm.
struct NarrowGemm {
  /// (x_rows, blocks * 128) e4m3 in int4_order, blocks = ceil(k / 128), zeros behind k; or with `bf16` (x_rows, k)
  /// bfloat16, rows x_stride elements apart. 16 bytes.
  const void* x = nullptr;
  bool bf16 = false;
  std::int64_t x_stride = 0;        ///< with bf16; divisible by 8
  const float* x_scales = nullptr;  ///< (x_rows, blocks), without bf16
  /// (x_rows, blocks): x_scales times 8 times the sum of the block's codes, which is taken off as the codes' zero is 8.
  const float* x_offsets = nullptr;
  const void* weight = nullptr;          ///< (experts, n, k) int4; 16 bytes
  const float* weight_scales = nullptr;  ///< (experts, blocks, n); 16 bytes
  /// With bf16: `weight` is (experts, n, k) e4m3, dense, and weight_scales (experts, ceil(n / 8), blocks).
  bool e4m3 = false;
  std::int64_t m = 0, n = 0, k = 0, experts = 1;
  std::int64_t x_rows = 0;

  const ExpertUnit* units = nullptr;        ///< of at most rows_per_unit positions each; or null: one matrix
  const std::int32_t* num_units = nullptr;  ///< on the device
  std::int64_t max_units = 0;
  int rows_per_unit = 16;  ///< 16, 32, 64 or, without bf16, 128: rows of a tile
  const std::int32_t* pairs = nullptr;
  int x_divisor = 1;
  bool gather = false, scatter = false;

  void* out = nullptr;          ///< (m, n) bfloat16 or, with out_fp32, float32; or what `silu` says
  std::int64_t out_stride = 0;  ///< elements
  bool out_fp32 = false;
  /// `weight` is [gate; up], n / 2 rows each: out is silu(gate) * up as the next product's x: with bf16 (m, n / 2) bfloat16,
  /// rows out_stride apart, else codes with scales and offsets.
  bool silu = false;
  float *out_scales = nullptr, *out_offsets = nullptr;

  bool programmatic_launch = false;
};

/// Whether narrow_gemm() takes it: k divisible by 16, n by 8 (with `silu` by 16).
bool fits_narrow_gemm(const NarrowGemm& args);

/// Queues the product: no allocation, no synchronisation; may be captured in a CUDA graph. Returns cudaErrorInvalidValue for
/// what fits_narrow_gemm() refuses and for missing pointers.
cudaError_t narrow_gemm(const NarrowGemm& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
