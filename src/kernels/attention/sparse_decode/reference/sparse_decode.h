#pragma once

#include "flash_mla/sparse.h"

namespace flash_mla::reference {

/// reference::sparse_decode on checked arguments.
void sparse_decode_unchecked(const SparseDecodeArgs& args, double softmax_scale);

}  // namespace flash_mla::reference
