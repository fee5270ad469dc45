#pragma once

#include "flash_mla/merge.h"

namespace flash_mla::sm90 {

/// flash_mla::merge_states, and merge_states_in_place with its mask, on checked arguments of one CUDA device, queued on `stream`. Throws Unsupported where
/// the device is none that this backend runs on. Implemented by merge.cu, or by
/// dense_decode/sm90/not_built.cpp in a build without CUDA.
void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                  const TensorView& lse_b, const TensorView& out, const TensorView& lse,
                  const TensorView& mask, LseBase base, void* stream);

}  // namespace flash_mla::sm90
