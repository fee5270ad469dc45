#pragma once

// Argument checks of a selection's output, which every operation that selects writes.

#include "api/checks.h"
#include "flash_mla/top_k.h"

namespace flash_mla::api {

/// `indices` of n rows, and what says where its positions come from.
void check_top_k_output_shapes(const TopKOutput& output, const TensorView& indices, std::int64_t n);

/// That the positions 0 to length - 1 of a row can be written. Host tensors only.
void check_top_k_output_values(const TopKOutput& output, std::int64_t row, std::int64_t length,
                               std::int64_t num_rows);

}  // namespace flash_mla::api
