#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/quantized_layers.h"
#include "model/weights.h"

namespace flash_mla::model {

// Weights in e4m3 as the products of a GPU take them (kernels/gemm/sm90): a scale for every 8 rows and 128 columns. A
// checkpoint's blocks of 128 x 128 are 16 of these below each other, which lets matrices lie on each other that end
// within a block. All of this is on the host.

inline constexpr std::int64_t kE4m3Rows = 8, kE4m3Columns = 128;

/// How many scales a matrix has.
inline std::int64_t e4m3_scales(std::int64_t rows, std::int64_t columns) {
  return (rows + kE4m3Rows - 1) / kE4m3Rows * ((columns + kE4m3Columns - 1) / kE4m3Columns);
}

struct E4m3Weight {
  E4m3Weight(std::int64_t num_rows, std::int64_t num_columns);

  std::int64_t rows, columns;
  std::unique_ptr<std::uint8_t[]> codes;  ///< (rows, columns)
  std::vector<float> scales;              ///< (ceil(rows / 8), ceil(columns / 128))
};

/// Whether such kernels take a matrix of that many rows and columns: a row of scales is 8 of its rows, and they read 16
/// codes at a time.
inline bool takes_e4m3(std::int64_t rows, std::int64_t columns) {
  return rows > 0 && columns > 0 && rows % kE4m3Rows == 0 && columns % 16 == 0;
}

/// Whether `weight` is stored in e4m3 with scales that can be told apart so; of its rows that shows when it is read.
bool stored_as_e4m3(const Weight& weight);

/// The form that `quantize` asks for in layers of this kind: e4m3 or nothing.
bool asks_for_e4m3(ModelQuantize quantize, LayerKind kind);

// `codes` and `scales` below have the sizes of E4m3Weight's.

/// A stored weight as it is; false, with anything in them, where neighbours among 8 rows have different scales. Requires
/// stored_as_e4m3(); throws as Weight::read_quantized does.
bool read_e4m3(const Weight& weight, std::uint8_t* codes, float* scales);

/// bfloat16 values (rows, columns) quantised in blocks of 128 x 128, as the CPU's layers are.
void quantise_e4m3(const std::uint16_t* values, std::int64_t rows, std::int64_t columns, std::uint8_t* codes,
                   float* scales);

/// Whether the scales of a matrix of that many rows and columns are alike in each 128 rows, as in a checkpoint's blocks.
bool in_whole_blocks(const float* scales, std::int64_t rows, std::int64_t columns);
/// The same of each half of the rows, of which the second need not begin with a block of the first.
bool in_halves_of_blocks(const float* scales, std::int64_t rows, std::int64_t columns);

/// Rows [row, row + rows) of columns [column, column + columns) of `weight`, made dense. Requires row divisible by 8 and
/// column by 128, and of rows and columns the same but where they reach the end.
struct E4m3Cut {
  std::int64_t row = 0, rows = 0, column = 0, columns = 0;
};
void cut_e4m3(const E4m3Weight& weight, const E4m3Cut& cut, std::uint8_t* codes, float* scales);

}  // namespace flash_mla::model
