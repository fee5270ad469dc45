#pragma once

// The recipes of include/flash_mla/quantise.h, one operation of float32 at a time: every backend's quantisers
// give these bits. Usable in device code.

#include <cfloat>

#include "base/fp8.h"
#include "flash_mla/quantise.h"

#ifdef __CUDACC__
#define FLASH_MLA_QUANT_FUNCTION __host__ __device__ inline
#else
#define FLASH_MLA_QUANT_FUNCTION inline
#endif

namespace flash_mla::quant {

FLASH_MLA_QUANT_FUNCTION float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

constexpr bool scales_are_powers_of_two(Fp8Recipe recipe) {
  return recipe == Fp8Recipe::kFlashMla || recipe == Fp8Recipe::kIndexerPow2 ||
         recipe == Fp8Recipe::kVllmIndexer;
}

/// The scale of a tile whose largest magnitude is amax >= 0.
FLASH_MLA_QUANT_FUNCTION float tile_scale(Fp8Recipe recipe, float amax) {
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  switch (recipe) {
    case Fp8Recipe::kFlashMla:
      return next_power_of_two(larger(divide(amax, kE4m3Max), 1e-4f));
    case Fp8Recipe::kVllm:
      return larger(divide(amax, kE4m3Max), FLT_MIN);
    case Fp8Recipe::kSglang:
      return divide(amax, kE4m3Max);
    case Fp8Recipe::kIndexerPow2:
      return next_power_of_two(divide(larger(amax, 1e-4f), kE4m3Max));
    case Fp8Recipe::kIndexer:
      return divide(larger(amax, 1e-4f), kE4m3Max);
    case Fp8Recipe::kVllmIndexer:
      return next_power_of_two(divide(larger(amax, 1e-10f), kE4m3Max));
  }
  return 1.0f;
}

/// The e4m3 of x under a tile's scale.
FLASH_MLA_QUANT_FUNCTION E4m3 quantise_value(Fp8Recipe recipe, float x, float scale) {
  if (recipe != Fp8Recipe::kSglang) return to_e4m3(divide(x, scale));
  // The reciprocal of a tile of zeros, or of nearly so, is infinite: a zero stays one.
  if (x == 0.0f) return to_e4m3(x);
  const float inverse = divide(1.0f, scale);
#ifdef __CUDA_ARCH__
  return to_e4m3(__fmul_rn(x, inverse));
#else
  return to_e4m3(x * inverse);
#endif
}

}  // namespace flash_mla::quant
