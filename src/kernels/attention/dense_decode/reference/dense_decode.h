#pragma once

#include "flash_mla/decode.h"

namespace flash_mla::reference {

/// The definition behind flash_mla::reference::dense_decode. Arguments have been checked and live on the host.
void dense_decode(const DenseDecodeArgs& args, double softmax_scale, bool causal);

}  // namespace flash_mla::reference
