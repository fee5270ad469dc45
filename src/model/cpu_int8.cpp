#include "model/cpu_int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/parallel.h"

// A product with few rows is bound by reading the weights, which are expanded in registers then. With more,
// a panel's next 256 depths are expanded once into the first-level cache and multiplied with a block of rows.

namespace flash_mla::model {
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

Int8Weight::Int8Weight(const float* weight, std::int64_t out_features, std::int64_t in_features, DType dtype)
    : kernel_(panel::select_kernel(dtype)),
      out_features_(out_features),
      in_features_(in_features),
      depth_(round_up(in_features, kernel_.depth_multiple)),
      packed_(static_cast<std::size_t>(round_up(out_features, kColumns) * depth_)),
      scales_(static_cast<std::size_t>(out_features)) {
  std::vector<std::int8_t> values(static_cast<std::size_t>(kColumns * depth_));
  for (std::int64_t n = 0; n < out_features; n += kColumns) {
    std::fill(values.begin(), values.end(), std::int8_t{0});
    for (std::int64_t c = 0; c < std::min(kColumns, out_features - n); ++c) {
      scales_[static_cast<std::size_t>(n + c)] =
          quantize(weight + (n + c) * in_features, in_features, values.data() + c * depth_);
    }
    for (std::int64_t k = 0; k < depth_; k += kDepth) {
      kernel_.pack(values.data() + k, depth_, std::min(kDepth, depth_ - k),
                   packed_.data() + n * depth_ + k * kColumns);
    }
  }
}

void Int8Weight::multiply(const Matrix& x, const float* bias, const Matrix& y, int threads,
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

void Int8Weight::multiply_panel(const Matrix& x, const float* bias, const Matrix& y, bool accumulate,
                                std::int64_t panel, std::int64_t first, std::int64_t count) const {
  alignas(64) thread_local float sums[kBlockRows * kColumns];
  alignas(64) thread_local std::byte expanded[kDepth * kColumns * sizeof(float)];
  const auto stride =
      static_cast<std::ptrdiff_t>(x.stride) * static_cast<std::ptrdiff_t>(dtype_size(x.dtype));
  const std::uint8_t* packed = packed_.data() + panel * kColumns * depth_;
  for (std::int64_t k = 0; k < depth_; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, depth_ - k);
    const std::byte* rows = x.column_range(k, depth).row(first);
    if (count <= kernel_.few_rows) {
      kernel_.multiply_int8(rows, stride, count, packed + k * kColumns, depth, sums, k > 0);
    } else {
      kernel_.expand(packed + k * kColumns, depth, expanded);
      kernel_.multiply(rows, stride, count, expanded, depth, sums, k > 0);
    }
  }
  const std::int64_t column = panel * kColumns;
  const panel::Finish finish{scales_.data() + column, bias != nullptr ? bias + column : nullptr,
                             std::min(kColumns, out_features_ - column), y.dtype, accumulate};
  for (std::int64_t i = 0; i < count; ++i) {
    kernel_.finish(sums + i * kColumns, finish, y.column_range(column, finish.count).row(first + i));
  }
}

}  // namespace flash_mla::model
