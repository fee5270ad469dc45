#include "kernels/gemm/cpu/panel_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/aligned.h"
#include "base/element.h"
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

std::ptrdiff_t bytes_between_rows(const Matrix& m) {
  return static_cast<std::ptrdiff_t>(m.stride) * static_cast<std::ptrdiff_t>(dtype_size(m.dtype));
}

/// y = sums + bias, or with `accumulate` y += that.
template <class T>
void finish(const panel::Block& b, const float* sums) {
  for (std::int64_t r = 0; r < b.rows; ++r, sums += kColumns) {
    auto* y = reinterpret_cast<T*>(b.y + r * b.y_stride);
    for (std::int64_t i = 0; i < b.columns; ++i) {
      float value = sums[i];
      if (b.bias != nullptr) value += b.bias[i];
      if (b.accumulate) value += to_float(y[i]);
      y[i] = from_double<T>(static_cast<double>(value));
    }
  }
}

}  // namespace

PanelWeight::PanelWeight(std::int64_t out_features, std::int64_t in_features, DType dtype, bool plain,
                         panel::Codes codes, std::int64_t group)
    : kernel_(panel::select_kernel(dtype)),
      plain_(plain),
      codes_(codes),
      out_features_(out_features),
      in_features_(in_features),
      depth_(round_up(in_features, kernel_.depth_multiple)),
      group_(group < in_features ? group : depth_) {
  const std::int64_t padded = round_up(out_features, kColumns), size = padded * depth_;
  const std::int64_t bytes =
      plain ? size * static_cast<std::int64_t>(kernel_.plain_element) : panel::packed_bytes(codes, size);
  packed_ = allocate_aligned(static_cast<std::size_t>(bytes));
  if (!plain) scales_.resize(static_cast<std::size_t>(padded * ((depth_ + group_ - 1) / group_)));
}

PanelWeight::PanelWeight(const float* weight, std::int64_t out_features, std::int64_t in_features,
                         DType dtype, Form form)
    : PanelWeight(out_features, in_features, dtype, form == Form::kPlain, panel::Codes::kInt8, in_features) {
  for_panels([&](std::int64_t p) {
    const std::int64_t first = p * kColumns, count = std::min(kColumns, out_features_ - first);
    thread_local std::vector<float> values;
    values.assign(static_cast<std::size_t>(kColumns * depth_), 0.0f);
    for (std::int64_t c = 0; c < count; ++c) {
      std::copy_n(weight + (first + c) * in_features_, in_features_, values.data() + c * depth_);
    }
    if (plain_) {
      for (std::int64_t k = 0; k < depth_; k += kDepth) {
        kernel_.pack_plain(values.data() + k, depth_, std::min(kDepth, depth_ - k), packed(p, k));
      }
      return;
    }
    thread_local std::vector<std::int8_t> quantized;
    quantized.assign(values.size(), 0);
    for (std::int64_t c = 0; c < count; ++c) {
      scales_[static_cast<std::size_t>(first + c)] =
          quantize(values.data() + c * depth_, depth_, quantized.data() + c * depth_);
    }
    pack_panel(p, reinterpret_cast<const std::uint8_t*>(quantized.data()));
  });
}

PanelWeight::PanelWeight(const std::uint8_t* codes, const float* scales, QuantizedFormat format,
                         std::int64_t out_features, std::int64_t in_features, DType dtype)
    : PanelWeight(out_features, in_features, dtype, false,
                  format.type == QuantizedType::kE4m3 ? panel::Codes::kE4m3 : panel::Codes::kInt4,
                  format.group) {
  const std::int64_t groups = format.groups(in_features);
  for_panels([&](std::int64_t p) {
    const std::int64_t first = p * kColumns, count = std::min(kColumns, out_features_ - first);
    for (std::int64_t c = 0; c < count; ++c) {
      for (std::int64_t g = 0; g < groups; ++g) {
        scales_[static_cast<std::size_t>((p * groups + g) * kColumns + c)] = scales[(first + c) * groups + g];
      }
    }
    if (count == kColumns && depth_ == in_features_) return pack_panel(p, codes + first * in_features_);
    // Codes that are not there meet a zero of the rows, or a column that nobody reads.
    thread_local std::vector<std::uint8_t> padded;
    padded.assign(static_cast<std::size_t>(kColumns * depth_), 0);
    for (std::int64_t c = 0; c < count; ++c) {
      std::copy_n(codes + (first + c) * in_features_, in_features_, padded.data() + c * depth_);
    }
    pack_panel(p, padded.data());
  });
}

bool PanelWeight::takes(const QuantizedFormat& format, std::int64_t in_features, DType dtype) {
  return format.group >= in_features || format.group % panel::select_kernel(dtype).depth_multiple == 0;
}

template <class F>
void PanelWeight::for_panels(const F& f) {
  const std::int64_t panels = (out_features_ + kColumns - 1) / kColumns;
  constexpr std::int64_t kWorthThreads = 1 << 18;  // to pack one takes a nanosecond or two
  parallel_for(panels, out_features_ * in_features_ >= kWorthThreads ? default_threads() : 1, f);
}

/// `codes` (kColumns, depth_).
void PanelWeight::pack_panel(std::int64_t panel, const std::uint8_t* codes) {
  for (std::int64_t k = 0; k < depth_; k += kDepth) {
    kernel_.pack(codes_, codes + k, depth_, std::min(kDepth, depth_ - k), packed(panel, k));
  }
}

std::byte* PanelWeight::packed(std::int64_t panel, std::int64_t k) const {
  return packed_.data() + bytes((panel * depth_ + k) * kColumns);
}

std::int64_t PanelWeight::bytes(std::int64_t weights) const {
  return plain_ ? weights * static_cast<std::int64_t>(kernel_.plain_element)
                : panel::packed_bytes(codes_, weights);
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
  alignas(64) thread_local float totals[kBlockRows * kColumns];
  const std::int64_t column = panel * kColumns, columns = std::min(kColumns, out_features_ - column);
  panel::Block block{};
  block.x_stride = bytes_between_rows(x);
  block.rows = count;
  block.sums = sums;
  block.columns = columns;
  const auto to_result = [&](panel::Block& b) {
    b.y = y.column_range(column, columns).row(first);
    b.y_stride = bytes_between_rows(y);
    b.y_dtype = y.dtype;
    b.bias = bias != nullptr ? bias + column : nullptr;
    b.accumulate = accumulate;
  };
  const std::int64_t groups = (depth_ + group_ - 1) / group_;
  if (groups == 1) {
    to_result(block);
  } else {
    block.y = reinterpret_cast<std::byte*>(totals);
    block.y_stride = kColumns * static_cast<std::ptrdiff_t>(sizeof(float));
    block.y_dtype = DType::kFloat32;
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t end = std::min(depth_, (g + 1) * group_);
    if (!plain_) block.scale = scales_.data() + (panel * groups + g) * kColumns;
    if (groups > 1) block.accumulate = g > 0;
    for (std::int64_t k = g * group_; k < end; k += kDepth) {
      block.x = x.column_range(k, kDepth).row(first);
      block.depth = std::min(kDepth, end - k);
      block.first = k == g * group_;
      block.last = k + kDepth >= end;
      multiply_depth(block, packed(panel, k));
    }
  }
  if (groups == 1) return;
  to_result(block);
  y.dtype == DType::kBFloat16 ? finish<Bf16>(block, totals) : finish<float>(block, totals);
}

void PanelWeight::multiply_depth(panel::Block& block, const std::byte* weights) const {
  // In memory the next depths follow, or the next panel.
  block.ahead_bytes = bytes(block.depth * kColumns);
  block.ahead = weights + block.ahead_bytes;
  if (plain_) {
    kernel_.multiply(block, weights);
  } else if (block.rows <= kernel_.few_rows) {
    kernel_.multiply_packed(codes_, block, weights);
  } else {
    alignas(64) thread_local std::byte expanded[kDepth * kColumns * sizeof(float)];
    kernel_.expand(codes_, weights, block.depth, expanded);
    kernel_.multiply(block, expanded);
  }
}

}  // namespace flash_mla::cpu
