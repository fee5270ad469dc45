#pragma once

#include <cstdint>
#include <vector>

#include "base/matrix.h"
#include "kernels/gemm/cpu/gemm.h"
#include "model/device/cpu/context.h"
#include "model/quantized_layers.h"
#include "model/weights.h"

namespace flash_mla::model {

/// A weight's values, float32.
std::vector<float> read_values(const Weight& weight);

/// x·W^T + bias. Products are shared among the context's threads.
class CpuLinear {
 public:
  /// The weight as `pack` makes it; `bias` may be empty.
  CpuLinear(const CpuContext& context, const Weight& weight, LayerKind kind, std::vector<float> bias = {});

  /// out = x·W^T + bias
  void multiply(const CpuContext& context, const Matrix& x, const Matrix& out) const;
  /// inout += x·W^T + bias
  void multiply_add(const CpuContext& context, const Matrix& x, const Matrix& inout) const;

 private:
  cpu::PackedWeight weight_;
  std::vector<float> bias_;
  std::vector<std::string> tensors_;
};

/// `weight` quantised as the context asks for in layers of this kind; else as it is stored, where that is quantised
/// and can be multiplied so; else in the context's dtype.
cpu::PackedWeight pack(const CpuContext& context, const Weight& weight, LayerKind kind);

/// One matrix (out_features, in_features) per attention head, never quantised.
class CpuHeadLinear {
 public:
  /// `weights` (heads, out_features, in_features).
  CpuHeadLinear(const CpuContext& context, const float* weights, std::int64_t heads,
                std::int64_t out_features, std::int64_t in_features);

  /// Of every head h: out's out_features columns from h * out_width on = x's in_features columns from
  /// h * x_width on · W[h]^T; then `also(h)`.
  template <class F>
  void multiply(const CpuContext& context, const Matrix& x, std::int64_t x_width, const Matrix& out,
                std::int64_t out_width, F&& also) const {
    const std::int64_t out_features = heads_[0].out_features(), in_features = heads_[0].in_features();
    const bool threads = worth_threads(std::ssize(heads_) * out_features * in_features, x.rows);
    parallel_for(std::ssize(heads_), threads ? context.threads : 1, [&](std::int64_t h) {
      context.gemm.run(x.column_range(h * x_width, in_features), heads_[static_cast<std::size_t>(h)], nullptr,
                       out.column_range(h * out_width, out_features),
                       {1, context.step->batch_invariant, false});
      also(h);
    });
  }

 private:
  std::vector<cpu::PackedWeight> heads_;
};

}  // namespace flash_mla::model
