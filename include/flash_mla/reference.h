#pragma once

#include "flash_mla/decode.h"
#include "flash_mla/export.h"

namespace flash_mla::reference {

/// dense_decode by the definition: one thread, no splits, every sum in float64, straight over the paged
/// layout. For verification, not for speed.
///
/// Takes what dense_decode takes, and float64 besides. `out` and `lse` may each be float32 or float64
/// whatever q's dtype is (or q's dtype), so that a comparison sees the unrounded value.
FLASH_MLA_API void dense_decode(const DenseDecodeArgs& args, const DenseDecodeOptions& options = {});

}  // namespace flash_mla::reference
