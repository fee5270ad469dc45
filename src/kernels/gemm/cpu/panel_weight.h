#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "kernels/gemm/cpu/panel.h"

namespace flash_mla::cpu {

/// A weight matrix in panels for the kernels of cpu_panel.h, in one of two forms:
///
///   kPlain  the dtype of the rows that it is multiplied with
///   kInt8   8 bits and one scale for each output feature, symmetric around zero: weight[n][k] is close to
///           scale[n] * q[n][k] with |q| <= 127 and scale[n] = max over k of |weight[n][k]| / 127
class PanelWeight {
 public:
  enum class Form { kPlain, kInt8 };

  /// `weight` (out_features, in_features) row-major, finite; for products with rows of `dtype`.
  PanelWeight(const float* weight, std::int64_t out_features, std::int64_t in_features, DType dtype,
              Form form);

  /// y = x·W^T + bias on `threads` threads, += with `accumulate`. `bias` (out_features) or null; x of the
  /// weight's dtype, y of that or float32. The bits of a row do not depend on the other rows.
  void multiply(const Matrix& x, const float* bias, const Matrix& y, int threads, bool accumulate) const;

  std::size_t bytes() const { return packed_.bytes() + scales_.size() * sizeof(float); }

 private:
  // Rows [first, first + count) times one panel.
  void multiply_panel(const Matrix& x, const float* bias, const Matrix& y, bool accumulate,
                      std::int64_t panel, std::int64_t first, std::int64_t count) const;
  // A panel's weights from depth k on; k is a multiple of kDepth.
  std::byte* packed(std::int64_t panel, std::int64_t k) const;

  const panel::Kernel& kernel_;
  Form form_;
  std::int64_t out_features_, in_features_, depth_;  // depth: in_features rounded up to what the kernel takes
  std::int64_t element_;                             // bytes of a packed weight
  Buffer packed_;                                    // panel after panel
  std::vector<float> scales_;                        // (out_features), of kInt8
};

}  // namespace flash_mla::cpu
