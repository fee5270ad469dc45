#include "model/e4m3_weight.h"

#include <algorithm>
#include <optional>

#include "base/element.h"
#include "kernels/quant/cpu/weights.h"

namespace flash_mla::model {
namespace {

std::int64_t scale_columns(std::int64_t columns) { return (columns + kE4m3Columns - 1) / kE4m3Columns; }

}  // namespace

E4m3Weight::E4m3Weight(std::int64_t num_rows, std::int64_t num_columns)
    : rows(num_rows),
      columns(num_columns),
      codes(std::make_unique_for_overwrite<std::uint8_t[]>(static_cast<std::size_t>(rows * columns))),
      scales(static_cast<std::size_t>(e4m3_scales(rows, columns))) {}

bool stored_as_e4m3(const Weight& weight) {
  if (!weight.stored || weight.stored->type != QuantizedType::kE4m3) return false;
  const std::int64_t group = weight.stored->group;
  return takes_e4m3(weight.rows, weight.columns) && (group % kE4m3Columns == 0 || group >= weight.columns);
}

bool asks_for_e4m3(ModelQuantize quantize, LayerKind kind) {
  const std::optional<QuantizedFormat> format = quantized_format(quantize, kind);
  return format && format->type == QuantizedType::kE4m3;
}

bool read_e4m3(const Weight& weight, std::uint8_t* codes, float* scales) {
  const std::int64_t groups = weight.stored->groups(weight.columns), width = scale_columns(weight.columns);
  std::vector<float> rows(static_cast<std::size_t>(weight.rows * groups));
  weight.read_quantized(codes, rows.data());
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    const float* const own = rows.data() + row * groups;
    const float* const first = rows.data() + row / kE4m3Rows * kE4m3Rows * groups;
    if (!std::equal(own, own + groups, first)) return false;
    if (own != first) continue;
    for (std::int64_t c = 0; c < width; ++c) {
      scales[row / kE4m3Rows * width + c] = own[c * kE4m3Columns / weight.stored->group];
    }
  }
  return true;
}

void quantise_e4m3(const std::uint16_t* values, std::int64_t rows, std::int64_t columns, std::uint8_t* codes,
                   float* scales) {
  static_assert(kFp8Block == kE4m3Columns && kFp8Block % kE4m3Rows == 0);
  std::vector<float> wide(static_cast<std::size_t>(rows * columns));
  std::transform(values, values + rows * columns, wide.begin(),
                 [](std::uint16_t x) { return to_float(Bf16{x}); });
  const std::int64_t width = scale_columns(columns), block_rows = (rows + kFp8Block - 1) / kFp8Block;
  std::vector<float> blocks(static_cast<std::size_t>(block_rows * width));
  cpu::quantise_fp8_blocks(wide.data(), rows, columns, false, codes, blocks.data());
  for (std::int64_t row = 0; row < rows; row += kE4m3Rows) {
    std::copy_n(blocks.data() + row / kFp8Block * width, width, scales + row / kE4m3Rows * width);
  }
}

bool in_whole_blocks(const float* scales, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kRowsOfBlock = kFp8Block / kE4m3Rows;
  const std::int64_t width = scale_columns(columns), scale_rows = (rows + kE4m3Rows - 1) / kE4m3Rows;
  for (std::int64_t row = 0; row < scale_rows; ++row) {
    const float* const first = scales + row / kRowsOfBlock * kRowsOfBlock * width;
    if (!std::equal(first, first + width, scales + row * width)) return false;
  }
  return true;
}

bool in_halves_of_blocks(const float* scales, std::int64_t rows, std::int64_t columns) {
  const std::int64_t half = rows / 2;
  return rows % 2 == 0 && half % kE4m3Rows == 0 && in_whole_blocks(scales, half, columns) &&
         in_whole_blocks(scales + e4m3_scales(half, columns), half, columns);
}

void cut_e4m3(const E4m3Weight& weight, const E4m3Cut& cut, std::uint8_t* codes, float* scales) {
  for (std::int64_t i = 0; i < cut.rows; ++i) {
    std::copy_n(weight.codes.get() + (cut.row + i) * weight.columns + cut.column, cut.columns,
                codes + i * cut.columns);
  }
  const std::int64_t from = scale_columns(weight.columns), to = scale_columns(cut.columns);
  for (std::int64_t i = 0; i < cut.rows; i += kE4m3Rows) {
    std::copy_n(weight.scales.data() + (cut.row + i) / kE4m3Rows * from + cut.column / kE4m3Columns, to,
                scales + i / kE4m3Rows * to);
  }
}

}  // namespace flash_mla::model
