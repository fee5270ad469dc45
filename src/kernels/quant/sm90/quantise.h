#pragma once

#include "flash_mla/quantise.h"

namespace flash_mla::sm90 {

/// flash_mla::quantise_fp8 on checked arguments of one CUDA device, queued on `stream`. Throws Unsupported where the
/// device is none that this backend runs on. Implemented by quantise.cu, or by dense_decode/sm90/not_built.cpp in a build
/// without CUDA.
void quantise_fp8(const TensorView& x, int tile, Fp8Recipe recipe, const TensorView& values,
                  const TensorView& scales, void* stream);

}  // namespace flash_mla::sm90
