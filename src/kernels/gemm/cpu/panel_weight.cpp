#include "kernels/gemm/cpu/panel_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/aligned.h"
#include "base/parallel.h"

// Weights of 8 bits: a product with few rows is bound by reading them, they are expanded in registers then.
// With more, a panel's next 256 depths are expanded into the first-level cache for a block of rows.

namespace flash_mla::cpu {
namespace {

using panel::kColumns;
using panel::kDepth;

/// Rows whose sums stay in the first-level cache: 24 KB of them.
constexpr std::int64_t kBlockRows = 96;

std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

/// Quantises one row of `depth` weights; its scale. A row of zeros has scale 0.
float quantize(const float* weight, std::int64_t depth, std::int8_t* out) {
  float highest = 0;
  for (std::int64_t k = 0; k < depth; ++k) highest = std::max(highest, std::abs(weight[k]));
  const float scale = highest / 127;
  const float inverse = scale > 0 ? 127 / highest : 0;
  for (std::int64_t k = 0; k < depth; ++k) {
    out[k] = static_cast<std::int8_t>(std::clamp(std::nearbyint(weight[k] * inverse), -127.0f, 127.0f));
  }
  return scale;
}

}  // namespace

PanelWeight::PanelWeight(const float* weight, std::int64_t out_features, std::int64_t in_features,
                         DType dtype, Form form)
    : kernel_(panel::select_kernel(dtype)),
      form_(form),
      out_features_(out_features),
      in_features_(in_features),
      depth_(round_up(in_features, kernel_.depth_multiple)),
      element_(form == Form::kInt8 ? 1 : static_cast<std::int64_t>(kernel_.plain_element)),
      packed_(
          allocate_aligned(static_cast<std::size_t>(round_up(out_features, kColumns) * depth_ * element_))),
      scales_(form == Form::kInt8 ? static_cast<std::size_t>(out_features) : 0) {
  const auto size = static_cast<std::size_t>(kColumns * depth_);
  std::vector<float> plain(size);
  std::vector<std::int8_t> quantized(size);
  for (std::int64_t p = 0; p * kColumns < out_features; ++p) {
    const std::int64_t first = p * kColumns, count = std::min(kColumns, out_features - first);
    std::fill(plain.begin(), plain.end(), 0.0f);
    for (std::int64_t c = 0; c < count; ++c) {
      std::copy_n(weight + (first + c) * in_features, in_features, plain.data() + c * depth_);
    }
    if (form == Form::kInt8) {
      std::fill(quantized.begin(), quantized.end(), std::int8_t{0});
      for (std::int64_t c = 0; c < count; ++c) {
        scales_[static_cast<std::size_t>(first + c)] =
            quantize(plain.data() + c * depth_, depth_, quantized.data() + c * depth_);
      }
    }
    for (std::int64_t k = 0; k < depth_; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, depth_ - k);
      if (form == Form::kInt8) {
        kernel_.pack_int8(quantized.data() + k, depth_, depth, packed(p, k));
      } else {
        kernel_.pack_plain(plain.data() + k, depth_, depth, packed(p, k));
      }
    }
  }
}

std::byte* PanelWeight::packed(std::int64_t panel, std::int64_t k) const {
  return packed_.data() + (panel * depth_ + k) * kColumns * element_;
}

void PanelWeight::multiply(const Matrix& x, const float* bias, const Matrix& y, int threads,
                           bool accumulate) const {
  Matrix input = x;
  thread_local std::vector<std::byte> padded;
  if (depth_ != in_features_) {
    const auto element = static_cast<std::int64_t>(dtype_size(x.dtype));
    padded.assign(static_cast<std::size_t>(x.rows * depth_ * element), std::byte{0});
    input = {padded.data(), x.dtype, x.rows, depth_, depth_};
    for (std::int64_t i = 0; i < x.rows; ++i) {
      std::memcpy(input.row(i), x.row(i), static_cast<std::size_t>(in_features_ * element));
    }
  }
  const std::int64_t panels = (out_features_ + kColumns - 1) / kColumns;
  const std::int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows;
  const bool spread = worth_threads(out_features_ * in_features_, x.rows);
  parallel_for(panels * blocks, spread ? threads : 1, [&](std::int64_t i) {
    const std::int64_t first = i / panels * kBlockRows;
    multiply_panel(input, bias, y, accumulate, i % panels, first, std::min(kBlockRows, x.rows - first));
  });
}

void PanelWeight::multiply_panel(const Matrix& x, const float* bias, const Matrix& y, bool accumulate,
                                 std::int64_t panel, std::int64_t first, std::int64_t count) const {
  alignas(64) thread_local float sums[kBlockRows * kColumns];
  alignas(64) thread_local std::byte expanded[kDepth * kColumns * sizeof(float)];
  const auto bytes_between_rows = [](const Matrix& m) {
    return static_cast<std::ptrdiff_t>(m.stride) * static_cast<std::ptrdiff_t>(dtype_size(m.dtype));
  };
  const std::int64_t column = panel * kColumns, columns = std::min(kColumns, out_features_ - column);
  panel::Block block{};
  block.x_stride = bytes_between_rows(x);
  block.rows = count;
  block.sums = sums;
  block.y = y.column_range(column, columns).row(first);
  block.y_stride = bytes_between_rows(y);
  block.y_dtype = y.dtype;
  block.columns = columns;
  block.scale = scales_.empty() ? nullptr : scales_.data() + column;
  block.bias = bias != nullptr ? bias + column : nullptr;
  block.accumulate = accumulate;
  for (std::int64_t k = 0; k < depth_; k += kDepth) {
    block.x = x.column_range(k, kDepth).row(first);
    block.depth = std::min(kDepth, depth_ - k);
    block.first = k == 0;
    block.last = k + kDepth >= depth_;
    const std::byte* weights = packed(panel, k);
    // In memory the next depths follow, or the next panel.
    block.ahead_bytes = block.depth * kColumns * element_;
    block.ahead = weights + block.ahead_bytes;
    if (form_ == Form::kPlain) {
      kernel_.multiply(block, weights);
    } else if (count <= kernel_.few_rows) {
      kernel_.multiply_int8(block, weights);
    } else {
      kernel_.expand(weights, block.depth, expanded);
      kernel_.multiply(block, expanded);
    }
  }
}

}  // namespace flash_mla::cpu
