#pragma once

// The arithmetic of draws, the same to the bit on the CPU and on the GPU: no product and sum may be
// contracted to one operation, which the intrinsics forbid there and -ffp-contract=off here.

#include <cstdint>

#ifdef __CUDACC__
#define FLASH_MLA_HOST_DEVICE __host__ __device__
#else
#define FLASH_MLA_HOST_DEVICE
#endif

namespace flash_mla {

/// Weight of the likeliest token.
inline constexpr std::uint64_t kDrawOne = std::uint64_t{1} << 44;

FLASH_MLA_HOST_DEVICE inline float plain_mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FLASH_MLA_HOST_DEVICE inline float plain_add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

/// exp(below * scale) in units of 2^-44, for below = logit - largest <= 0 (or -inf) and scale > 0. Within a
/// few units of the last of 24 bits; below 2^-44 it is 0. Never more for a smaller logit than for one that is
/// larger by more than rounding; always kDrawOne for 0.
FLASH_MLA_HOST_DEVICE inline std::uint64_t draw_weight(float below, float scale) {
  const float y = plain_mul(below, scale);
  if (!(y > -31.0f)) return 0;
  // y = n ln 2 + r with |r| <= ln(2) / 2; the first part of ln 2 has so few bits that its product is exact.
  const int n = static_cast<int>(plain_add(plain_mul(y, 1.44269504f), -0.5f));
  const float k = static_cast<float>(n);
  const float r = plain_add(plain_add(y, plain_mul(k, -0.693359375f)), plain_mul(k, 2.12194440e-4f));
  float p = 1.0f / 5040;
  p = plain_add(plain_mul(p, r), 1.0f / 720);
  p = plain_add(plain_mul(p, r), 1.0f / 120);
  p = plain_add(plain_mul(p, r), 1.0f / 24);
  p = plain_add(plain_mul(p, r), 1.0f / 6);
  p = plain_add(plain_mul(p, r), 0.5f);
  p = plain_add(plain_mul(p, r), 1.0f);
  p = plain_add(plain_mul(p, r), 1.0f);
  // p is in [0.7, 1.42], a multiple of 2^-24.
  const std::uint64_t bits = static_cast<std::uint32_t>(plain_mul(p, 16777216.0f));
  return n >= -20 ? bits << (20 + n) : bits >> (-20 - n);
}

/// p in units of 2^-44 of the largest of its row, rounded down: p >= 0, largest > 0. Never more for a smaller p.
FLASH_MLA_HOST_DEVICE inline std::uint64_t probability_weight(float p, float largest) {
  return static_cast<std::uint64_t>(static_cast<double>(p) / static_cast<double>(largest) *
                                    static_cast<double>(kDrawOne));
}

/// `part` of `whole`, rounded down: part in [0, 1].
FLASH_MLA_HOST_DEVICE inline std::uint64_t part_of(double part, std::uint64_t whole) {
#ifdef __CUDA_ARCH__
  return __double2ull_rz(__dmul_rn(part, __ull2double_rn(whole)));
#else
  return static_cast<std::uint64_t>(part * static_cast<double>(whole));
#endif
}

/// The sum of weights that the drawn token's passes.
FLASH_MLA_HOST_DEVICE inline std::uint64_t draw_target(double u, std::uint64_t total) {
  const std::uint64_t target = part_of(u, total);
  return target < total ? target : total - 1;
}

}  // namespace flash_mla
