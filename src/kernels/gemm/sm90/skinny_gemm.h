#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// out[m, n] (= or +=) sum over k of x[m, k] * weight[n, k], plus bias[n]; fp32 accumulation.
///
/// Meant for few rows: the weights are read from memory once for every 64 rows of x and the time is that of
/// reading them. Correct for any m; above 64 rows a library's matrix product is quicker.
///
/// The fast path asks for k and x_stride divisible by 8 and x and weight aligned to 16 bytes (weight_fp32
/// included). Whatever else is multiplied by a plain kernel, correct and slow. `out` needs no more than the
/// alignment of its type; 8 bytes (bfloat16) or 16 (float32) of its rows give wide stores.
struct SkinnyGemm {
  const void* x = nullptr;       ///< (m, k) bfloat16, rows x_stride elements apart
  std::int64_t x_stride = 0;     ///< elements, at least k
  const void* weight = nullptr;  ///< (n, k) bfloat16 (float32 if weight_fp32), dense
  /// Not null: `weight` is e4m3, and weight[n][k] means its value times weight_scales[n / 8][k / 128]; (ceil(n / 8),
  /// ceil(k / 128)). Sums over 128 columns are taken on the values, exact in bfloat16, and scaled in fp32. The fast path
  /// asks for k divisible by 16 and n (with silu_mul n / 2) divisible by 8.
  const float* weight_scales = nullptr;
  const float* bias = nullptr;  ///< (n), or null
  void* out = nullptr;          ///< (m, n), with silu_mul (m, n / 2); rows out_stride elements apart
  std::int64_t out_stride = 0;  ///< elements
  std::int64_t m = 0, n = 0, k = 0;

  bool out_fp32 = false;  ///< out is float32 instead of bfloat16
  /// The weights are float32 and every product keeps all their bits (as a router asks): slower.
  bool weight_fp32 = false;
  bool accumulate = false;  ///< out += instead of out =
  /// `weight` is [gate; up], n / 2 rows each: out = silu(x·gate^T) * (x·up^T), both factors kept in fp32.
  bool silu_mul = false;
  /// A row's bits depend on neither the other rows nor m: the division of k among threads is a function of n
  /// and k alone.
  bool batch_invariant = false;
  /// Launched with programmatic stream serialization: may start while the kernel before it on the stream is
  /// still running, and then reads `weight` at once but x, bias and out only after that kernel's memory is
  /// visible. So `weight` must not be written by the kernel directly before. Every kernel here lets the next
  /// one start early, which a kernel launched without the attribute never notices.
  bool programmatic_launch = false;
};

/// Queues the product on `stream`: no allocation, no synchronisation, no workspace; may be captured in a CUDA
/// graph. m == 0 or n == 0 queues nothing. k == 0 gives the bias. Returns cudaErrorInvalidValue for negative
/// sizes, missing pointers, strides below the row length, an odd n with silu_mul, or weight_scales with weight_fp32.
cudaError_t skinny_gemm(const SkinnyGemm& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
