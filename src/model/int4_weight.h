#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "model/quantized_layers.h"
#include "model/weights.h"

namespace flash_mla::model {

// Weights of 4 bits for the experts of a GPU (kernels/gemm/sm90/int4_weights.h): a scale for every row and 128 columns.
// All of this is on the host.

/// Codes as base/quantized.h has them, a byte each.
struct Int4Weight {
  Int4Weight(std::int64_t num_rows, std::int64_t num_columns);

  std::int64_t groups() const { return (columns + kInt4Group - 1) / kInt4Group; }

  std::int64_t rows, columns;
  std::unique_ptr<std::uint8_t[]> codes;  ///< (rows, columns)
  std::vector<float> scales;              ///< (rows, groups)
};

/// Whether the kernels take a matrix of that many rows and columns.
inline bool takes_int4(std::int64_t rows, std::int64_t columns) {
  return rows > 0 && columns > 0 && rows % 8 == 0 && columns % 16 == 0;
}
/// Bytes of its codes, and how many scales it has.
inline std::size_t int4_bytes(std::int64_t rows, std::int64_t columns) {
  return static_cast<std::size_t>(rows * columns / 2);
}
inline std::int64_t int4_scales(std::int64_t rows, std::int64_t columns) {
  return rows * ((columns + kInt4Group - 1) / kInt4Group);
}

/// Whether `weight` is stored in 4 bits with scales of whole 128 columns, or one for each row.
bool stored_as_int4(const Weight& weight);
/// Whether `quantize` asks for 4 bits in layers of this kind.
bool asks_for_int4(ModelQuantize quantize, LayerKind kind);

/// As it is stored, or quantised as the CPU's layers are. Throws as the weight's readers do.
Int4Weight read_int4(const Weight& weight);

/// Rows [row, row + rows) of columns [column, column + columns) as the kernels take them. Requires row and rows
/// divisible by 2, columns by 8, and column by 128.
struct Int4Cut {
  std::int64_t row = 0, rows = 0, column = 0, columns = 0;
};
/// `codes`: int4_bytes() of the cut. `scales`: of its first row; those of its next 128 columns are `scale_stride` behind.
void pack_int4(const Int4Weight& weight, const Int4Cut& cut, std::uint8_t* codes, float* scales,
               std::int64_t scale_stride);

}  // namespace flash_mla::model
