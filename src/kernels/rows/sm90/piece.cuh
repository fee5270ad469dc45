#pragma once

// A few elements of a row that a thread loads or stores at once.

#include <cstdint>
#include <type_traits>

#include "base/cuda/element.cuh"
#include "kernels/quant/sm90/narrow_e4m3.cuh"

namespace flash_mla::sm90 {

template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Piece {
  T v[kVec];
};

/// y as T, or as e4m3 in bytes; a NaN becomes some NaN.
template <class T, int kVec>
__device__ Piece<T, kVec> narrow(const float (&y)[kVec]) {
  Piece<T, kVec> out;
  if constexpr (std::is_same_v<T, std::uint8_t>) {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      const std::uint16_t pair = narrow_e4m3(y[i], kVec > 1 ? y[(i + 1) % kVec] : 0.0f);
      out.v[i] = static_cast<std::uint8_t>(pair);
      if constexpr (kVec > 1) out.v[i + 1] = static_cast<std::uint8_t>(pair >> 8);
    }
  } else if constexpr (kVec > 1 && !std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      const std::uint32_t pair = pack<T>(y[i], y[(i + 1) % kVec]);
      out.v[i].bits = static_cast<std::uint16_t>(pair);
      out.v[i + 1].bits = static_cast<std::uint16_t>(pair >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out.v[i] = from_float<T>(y[i]);
  }
  return out;
}

}  // namespace flash_mla::sm90
