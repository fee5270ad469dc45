#pragma once

#include "kernels/attention/indexer/rows.h"

namespace flash_mla::reference {

/// The logits of every row, in float64, into a tensor of float32 or float64.
void index_logits(const indexer::Rows& rows, const TensorView& logits, bool compressed, bool clean);

}  // namespace flash_mla::reference
