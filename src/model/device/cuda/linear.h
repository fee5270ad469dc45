#pragma once

#include <cstdint>
#include <span>

#include "base/buffer.h"
#include "base/matrix.h"
#include "kernels/gemm/sm90/fp8_gemm.h"
#include "kernels/gemm/sm90/head_gemm.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "model/device/cuda/context.h"
#include "model/weights.h"

namespace flash_mla::model {

/// x·W^T + bias: few rows by skinny_gemm, many by cuBLASLt, for which weights in e4m3 are widened a panel at a time, or
/// from CudaContext::fp8_rows on in FP8.
class CudaLinear {
 public:
  /// `kind`: what may be quantised as the model is loaded.
  CudaLinear(CudaContext& context, const Weight& weight, std::span<const float> bias = {},
             LayerKind kind = LayerKind::kAttention);
  /// Always bfloat16.
  CudaLinear(CudaContext& context, const std::uint16_t* weight, std::int64_t out_features,
             std::int64_t in_features);

  /// out = x·W^T + bias
  void multiply(CudaContext& context, const Matrix& x, const Matrix& out) const {
    run(context, x, out, false);
  }
  /// inout += x·W^T + bias
  void multiply_add(CudaContext& context, const Matrix& x, const Matrix& inout) const {
    run(context, x, inout, true);
  }
  /// out = silu(x·G^T) * (x·U^T), where the rows of W are [G; U].
  void multiply_silu_mul(CudaContext& context, const Matrix& x, const Matrix& out) const;

  /// out = down · (silu(x·G^T) * (x·U^T)) in FP8, or `accumulate`d to it; false, with nothing done, where it is not to be or
  /// cannot be.
  bool multiply_feed_forward(CudaContext& context, const Matrix& x, const CudaLinear& down, const Matrix& out,
                             bool accumulate) const;
  /// One of these two.
  void run(CudaContext& context, const Matrix& x, const Matrix& out, bool accumulate) const;

  const std::byte* weight() const { return weight_.values.data(); }

 private:
  bool few_rows(const CudaContext& context, std::int64_t rows) const;
  sm90::Fp8Gemm fp8_args(const QuantisedRows& x, std::int64_t rows) const;
  sm90::Fp8Gemm product_fp8(CudaContext& context, const Matrix& x, const Matrix& out) const;
  bool takes_fp8(CudaContext& context, const Matrix& x, const Matrix& out) const;
  void multiply_fp8(CudaContext& context, const Matrix& x, const Matrix& out, bool accumulate) const;
  sm90::SkinnyGemm skinny_args(const CudaContext& context, const Matrix& x, const Matrix& out) const;
  void multiply_widened(CudaContext& context, const Matrix& x, const Matrix& out, bool accumulate) const;

  CudaMatrix weight_;
  Buffer bias_;  // empty: none
  std::int64_t out_features_, in_features_;
};

/// One matrix (out_features, in_features) per attention head.
class CudaHeadLinear {
 public:
  /// `weights` (heads, out_features, in_features) bfloat16, or null: made up.
  CudaHeadLinear(CudaContext& context, const std::uint16_t* weights, std::int64_t heads,
                 std::int64_t out_features, std::int64_t in_features);

  /// What head_gemm() takes for out = x·W^T, head by head, with `tail` columns copied behind every head's.
  sm90::HeadGemm product(const Matrix& x, const Matrix& out, int tail) const;

  const std::byte* weight() const { return weight_.data(); }

 private:
  Buffer weight_;
  int heads_, out_features_, in_features_;
};

}  // namespace flash_mla::model
