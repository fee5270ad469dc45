#pragma once

#include <cuda_runtime_api.h>

#include "model/ops.h"

namespace flash_mla::model::cuda {

/// One product per attention head, of bfloat16 matrices in fp32 accumulation:
///
///   out[t, h * out_width + n] = sum over k of x[t, h * x_width + k] * weight[h, n, k]
///
/// and, behind it, `tail` columns copied: out[t, h * out_width + out_features + j] =
/// x[t, h * x_width + in_features + j]. `weight` (heads, out_features, in_features), dense. The bits of a row
/// do not depend on the other rows.
struct HeadGemm {
  Matrix x, out;
  const std::byte* weight = nullptr;
  int heads = 0, out_features = 0, in_features = 0;
  int x_width = 0, out_width = 0, tail = 0;
};
void head_gemm(const HeadGemm& args, cudaStream_t stream);

}  // namespace flash_mla::model::cuda
