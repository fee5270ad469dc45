#pragma once

// Scalars of the FP8 formats: e4m3 (E4M3FN: bias 7, largest 448, no infinity, NaN S.1111.111) and the scales
// e8m0 (a power of two). Usable in device code.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace flash_mla {

struct E4m3 {
  std::uint8_t bits;
};
struct E8m0 {
  std::uint8_t bits;
};

inline constexpr float kE4m3Max = 448.0f;

/// Exact.
constexpr float to_float(E4m3 x) {
  const std::uint32_t magnitude = x.bits & 0x7Fu;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x80u) << 24;
  if (magnitude == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude >= 8) return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return sign != 0 ? -subnormal : subnormal;
}

/// Round to nearest, ties to even; beyond 448, infinity included, +-448; NaN stays NaN.
constexpr E4m3 to_e4m3(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint8_t>((bits >> 24) & 0x80u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<std::uint8_t>(sign | 0x7Fu)};
  if (magnitude >= 0x43E00000u) return {static_cast<std::uint8_t>(sign | 0x7Eu)};  // >= 448
  std::uint32_t rounded = 0;
  if (magnitude < 0x3C800000u) {
    // Below 2^-6: a multiple of 2^-9. That is the last place of numbers from 2^14 to 2^15, where the addition
    // rounds.
    const float sum = std::bit_cast<float>(magnitude) + 0x1p14f;
    rounded = std::bit_cast<std::uint32_t>(sum) - std::bit_cast<std::uint32_t>(0x1p14f);
  } else {
    const std::uint32_t rebiased = magnitude - (120u << 23);
    rounded = (rebiased + 0x7FFFFu + ((rebiased >> 20) & 1u)) >> 20;
  }
  return {static_cast<std::uint8_t>(sign | rounded)};
}

/// 2^(bits - 127), NaN for 0xFF.
constexpr float to_float(E8m0 x) {
  if (x.bits == 0xFF) return std::numeric_limits<float>::quiet_NaN();
  return x.bits == 0 ? 0x1p-127f : std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 23);
}

/// Of a power of two; what lies outside 2^-127 to 2^127 becomes the nearer of the two, and NaN stays NaN.
constexpr E8m0 to_e8m0(float power) {
  const auto bits = std::bit_cast<std::uint32_t>(power) & 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return {0xFF};
  const std::uint32_t exponent = bits >> 23;
  return {static_cast<std::uint8_t>(exponent < 254 ? exponent : 254u)};
}

/// The smallest power of two >= x, for a normal number x > 0.
constexpr float next_power_of_two(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7FFFFFu) & 0x7F800000u);
}

}  // namespace flash_mla
