#pragma once

#include "flash_mla/gqa.h"

namespace flash_mla::api {

/// Everything that shapes, dtypes and devices tell. `allow_reference_types`: float64 inputs, outputs of float32 or float64.
void check_gqa_shapes(const GqaArgs& args, const GqaOptions& options, bool allow_reference_types);

/// Everything that the values of lengths and tables tell. Host tensors only.
void check_gqa_values(const GqaArgs& args);

/// Sequences of the call.
std::int64_t gqa_batch(const GqaArgs& args);

}  // namespace flash_mla::api
