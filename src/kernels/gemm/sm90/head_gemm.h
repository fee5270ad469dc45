#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/matrix.h"

namespace flash_mla::sm90 {

/// One product per attention head, of bfloat16 matrices in fp32 accumulation:
///
///   out[t, h * out_width + n] = sum over k of x[t, h * x_width + k] * weight[h, n, k]
///
/// and, behind it, `tail` columns copied: out[t, h * out_width + out_features + j] =
/// x[t, h * x_width + in_features + j], if `cosines` is given with their pairs (2j, 2j + 1) turned. `weight`
/// (heads, out_features, in_features), dense. The bits of a row do not depend on the other rows.
struct HeadGemm {
  /// What else the kernel does, where `cache` is given: the latent of kv (tokens, rank + tail) is normalised,
  /// its last columns are turned as the tails are, and both go to the token's slot of the cache, if that is
  /// not -1; to its row, where no slots are given.
  struct Append {
    Matrix kv;
    const float* norm = nullptr;
    float eps = 0;
    const std::int64_t* slots = nullptr;  ///< or null
    std::byte* cache = nullptr;
    int rank = 0;
  };
  Matrix x, out;
  const std::byte* weight = nullptr;
  int heads = 0, out_features = 0, in_features = 0;
  int x_width = 0, out_width = 0, tail = 0;
  const float* cosines = nullptr;  ///< (tokens, tail / 2), or null
  const float* sines = nullptr;
  Append append;
};
void head_gemm(const HeadGemm& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
