#pragma once

#include <cstdint>
#include <vector>

#include "model/cpu_panel.h"
#include "model/ops.h"

namespace flash_mla::model {

/// A weight matrix in 8 bits with one scale for each output feature, symmetric around zero:
/// weight[n][k] is close to scale[n] * q[n][k], |q| <= 127, scale[n] = max over k of |weight[n][k]| / 127.
class Int8Weight {
 public:
  /// `weight` (out_features, in_features) row-major, finite; for products with rows of `dtype`.
  Int8Weight(const float* weight, std::int64_t out_features, std::int64_t in_features, DType dtype);

  /// y = x·W^T + bias on `threads` threads, += with `accumulate`. `bias` (out_features) or null; x of the
  /// weight's dtype, y of that or float32. The bits of a row do not depend on the other rows.
  void multiply(const Matrix& x, const float* bias, const Matrix& y, int threads, bool accumulate) const;

  std::size_t bytes() const { return packed_.size() + scales_.size() * sizeof(float); }

 private:
  // Rows [first, first + count) times one panel.
  void multiply_panel(const Matrix& x, const float* bias, const Matrix& y, bool accumulate,
                      std::int64_t panel, std::int64_t first, std::int64_t count) const;

  const panel::Kernel& kernel_;
  std::int64_t out_features_, in_features_, depth_;  // depth: in_features rounded up to what the kernel takes
  std::vector<std::uint8_t> packed_;                 // panel after panel
  std::vector<float> scales_;                        // (out_features)
};

}  // namespace flash_mla::model
