#pragma once

#include <cstdint>

namespace flash_mla::cpu {

// Quantisers of weight matrices (rows, columns), row-major and finite. Scales are positive; a block of zeros has
// scale 1.

/// e4m3 with a scale for every 128 x 128 block, its largest magnitude / 448, or with `powers` the next power of two.
/// `codes` (rows, columns), `scales` (blocks of rows, blocks of columns).
void quantise_fp8_blocks(const float* weight, std::int64_t rows, std::int64_t columns, bool powers,
                         std::uint8_t* codes, float* scales);

/// 4 bits with a scale in bfloat16 for every row and `group` columns: of the candidates largest magnitude / 7.5, / 8
/// and smaller ones, where the largest weights are cut, the one with the smallest squared error. `codes` (rows,
/// columns) as base/quantized.h says, `scales` (rows, groups).
void quantise_int4(const float* weight, std::int64_t rows, std::int64_t columns, std::int64_t group,
                   std::uint8_t* codes, float* scales);

}  // namespace flash_mla::cpu
