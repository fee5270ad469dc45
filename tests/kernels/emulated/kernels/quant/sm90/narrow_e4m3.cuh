#pragma once
#include <cstdint>

#include "base/fp8.h"

namespace flash_mla::sm90 {
inline std::uint16_t narrow_e4m3(float first, float second) {
  return static_cast<std::uint16_t>(to_e4m3(first).bits | to_e4m3(second).bits << 8);
}
}  // namespace flash_mla::sm90
