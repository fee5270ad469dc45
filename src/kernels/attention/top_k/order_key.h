#pragma once

// The order in which top_k takes scores, as an order of unsigned numbers. Usable in device code.

#include <bit>
#include <cstdint>

namespace flash_mla::selection {

inline constexpr std::uint32_t kZeroKey = 0x80000000u;
inline constexpr std::uint32_t kNanKey = 0xFFFFFFFFu;

/// Keys compare as the scores do: -0.0 and +0.0 have one key, every NaN has the largest. No score has a key
/// below 0x007FFFFF, that of -inf.
constexpr std::uint32_t order_key(float score) {
  const auto bits = std::bit_cast<std::uint32_t>(score);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kNanKey;
  if (magnitude == 0) return kZeroKey;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace flash_mla::selection
