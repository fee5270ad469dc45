#pragma once

#include "flash_mla/merge.h"

namespace flash_mla::cpu {

/// flash_mla::merge_states on checked arguments.
void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                  const TensorView& lse_b, const TensorView& out, const TensorView& lse, LseBase base,
                  const TensorView& mask);

}  // namespace flash_mla::cpu
