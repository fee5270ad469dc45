#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "base/quantized.h"
#include "kernels/gemm/cpu/panel.h"

namespace flash_mla::cpu {

/// A weight matrix in panels for the kernels of panel.h, in one of these forms:
///
///   kPlain  the dtype of the rows that it is multiplied with
///   kInt8   8 bits and one scale for each output feature, symmetric around zero: weight[n][k] is close to
///           scale[n] * q[n][k] with |q| <= 127 and scale[n] = max over k of |weight[n][k]| / 127
///   as stored  codes with a scale for every output feature and group of input features (base/quantized.h); the sums
///           of a group are taken on the codes' values and multiplied by the scale in float32
class PanelWeight {
 public:
  enum class Form { kPlain, kInt8 };

  /// `weight` (out_features, in_features) row-major, finite; for products with rows of `dtype`.
  PanelWeight(const float* weight, std::int64_t out_features, std::int64_t in_features, DType dtype,
              Form form);

  /// `codes` (out_features, in_features) with `scales` (out_features, groups), in a `format` that
  /// `takes` accepts.
  PanelWeight(const std::uint8_t* codes, const float* scales, QuantizedFormat format,
              std::int64_t out_features, std::int64_t in_features, DType dtype);

  /// Whether groups of that size can be told apart: kernels may take two input features at a time.
  static bool takes(const QuantizedFormat& format, std::int64_t in_features, DType dtype);

  /// y = x·W^T + bias on `threads` threads, += with `accumulate`. `bias` (out_features) or null; x of the
  /// weight's dtype, y of that or float32. The bits of a row do not depend on the other rows.
  void multiply(const Matrix& x, const float* bias, const Matrix& y, int threads, bool accumulate) const;

  std::size_t bytes() const { return packed_.bytes() + scales_.size() * sizeof(float); }

 private:
  PanelWeight(std::int64_t out_features, std::int64_t in_features, DType dtype, bool plain,
              panel::Codes codes, std::int64_t group);
  template <class F>
  void for_panels(const F& f);
  void pack_panel(std::int64_t panel, const std::uint8_t* codes);
  // Rows [first, first + count) times one panel.
  void multiply_panel(const Matrix& x, const float* bias, const Matrix& y, bool accumulate,
                      std::int64_t panel, std::int64_t first, std::int64_t count) const;
  void multiply_depth(panel::Block& block, const std::byte* weights) const;
  // Bytes of that many weights.
  std::int64_t bytes(std::int64_t weights) const;
  // A panel's weights from depth k on; k is a multiple of what the kernel takes.
  std::byte* packed(std::int64_t panel, std::int64_t k) const;

  const panel::Kernel& kernel_;
  bool plain_;
  panel::Codes codes_;                               // of weights that are not plain
  std::int64_t out_features_, in_features_, depth_;  // depth: in_features rounded up to what the kernel takes
  std::int64_t group_;                               // depth of one scale
  Buffer packed_;                                    // panel after panel
  std::vector<float> scales_;                        // (panels, groups, kColumns), unless plain
};

}  // namespace flash_mla::cpu
