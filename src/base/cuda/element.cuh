#pragma once

// base/element.h's conversions in device code, bit for bit.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "base/element.h"

namespace flash_mla::sm90 {

__device__ __forceinline__ float as_float(Bf16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float as_float(Fp16 x) {
  const float value = __half2float(__ushort_as_half(x.bits));
  // The instruction has one NaN for all.
  const std::uint32_t nan = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16 | 0x7F800000u |
                            static_cast<std::uint32_t>(x.bits & 0x3FFu) << 13;
  return value != value ? __uint_as_float(nan) : value;
}
__device__ __forceinline__ float as_float(float x) { return x; }

/// Rounded to nearest, ties to even; a NaN keeps its sign and becomes quiet, as on the host.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    const std::uint16_t nearest = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return {x != x ? static_cast<std::uint16_t>((__float_as_uint(x) >> 16) | 0x40u) : nearest};
  } else {
    const std::uint16_t nearest = __half_as_ushort(__float2half_rn(x));
    const auto sign = static_cast<std::uint16_t>((__float_as_uint(x) >> 16) & 0x8000u);
    return {x != x ? static_cast<std::uint16_t>(sign | 0x7E00u) : nearest};
  }
}

/// Two neighbours in one word, the first in its low half; a NaN becomes some NaN.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float first, float second) {
  std::uint32_t word;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
}

/// And apart again.
template <class T>
__device__ __forceinline__ void unpack(std::uint32_t word, float& first, float& second) {
  first = as_float(T{static_cast<std::uint16_t>(word)});
  second = as_float(T{static_cast<std::uint16_t>(word >> 16)});
}

}  // namespace flash_mla::sm90
