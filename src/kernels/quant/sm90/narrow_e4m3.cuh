#pragma once

#include <cstdint>

namespace flash_mla::sm90 {

/// Two numbers as e4m3, the first in the lower byte: to nearest, ties to even, beyond 448 +-448, NaN as NaN.
__device__ __forceinline__ std::uint16_t narrow_e4m3(float first, float second) {
  std::uint16_t x;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(x) : "f"(second), "f"(first));
  return x;
}

}  // namespace flash_mla::sm90
