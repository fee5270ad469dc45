#pragma once

#include <cstdint>

#include "flash_mla/quantise.h"
#include "kernels/quant/recipe.h"

namespace flash_mla::cpu {

/// flash_mla::quantise_fp8 on checked arguments.
void quantise_fp8(const TensorView& x, int tile, Fp8Recipe recipe, const TensorView& values,
                  const TensorView& scales);

/// The same for one tile, vectorised: n elements, a multiple of 16. Returns the scale.
float quantise_tile(const float* x, int n, Fp8Recipe recipe, E4m3* values);

}  // namespace flash_mla::cpu
