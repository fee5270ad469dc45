#pragma once

#include "base/element.h"
#include "flash_mla/export.h"
#include "kv/format.h"

namespace flash_mla::cpu {

/// The d_qk elements of a token as float32: one product per element, rounded once. `out` needs no alignment. The
/// engine calls it too.
FLASH_MLA_API void dequantise(const kv::Pool& pool, const kv::Token& token, float* out);

/// The same rounded to bfloat16, for machines with AVX512_BF16. `out` is aligned to 64 bytes. FP8 formats and
/// kBFloat16.
void dequantise_avx512_bf16(const kv::Pool& pool, const kv::Token& token, Bf16* out);

}  // namespace flash_mla::cpu
