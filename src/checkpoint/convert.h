#pragma once

#include "checkpoint/checkpoint.h"

namespace flash_mla::checkpoint {

/// Every element of `view` as float32, exactly; FP8 without its scales. `out` holds view.elements() floats.
void to_float32(const WeightView& view, float* out);
/// Elements [first, first + count) of it.
void to_float32(const WeightView& view, std::int64_t first, std::int64_t count, float* out);

}  // namespace flash_mla::checkpoint
