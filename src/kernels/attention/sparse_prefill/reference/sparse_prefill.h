#pragma once

#include "flash_mla/sparse.h"

namespace flash_mla::reference {

/// reference::sparse_prefill on checked arguments.
void sparse_prefill_unchecked(const SparsePrefillArgs& args, double softmax_scale);

}  // namespace flash_mla::reference
