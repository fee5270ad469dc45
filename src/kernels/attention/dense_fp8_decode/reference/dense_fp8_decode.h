#pragma once

#include "flash_mla/dense_fp8.h"

namespace flash_mla::reference {

/// reference::dense_fp8_decode on checked arguments. `causal` is resolved: false when s_q is 1.
void dense_fp8_decode_unchecked(const DenseFp8DecodeArgs& args, double softmax_scale, bool causal);

}  // namespace flash_mla::reference
