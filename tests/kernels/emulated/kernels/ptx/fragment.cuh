#pragma once
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90 {
template <bool kBf16>
std::uint32_t pack2(float low, float high) {
  std::uint32_t bits;
  if constexpr (kBf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    std::memcpy(&bits, &x, 4);
  } else {
    const __half2 x = __floats2half2_rn(low, high);
    std::memcpy(&bits, &x, 4);
  }
  return bits;
}
inline float quad_max(float x) {
  x = std::fmax(x, __shfl_xor_sync(~0U, x, 1));
  return std::fmax(x, __shfl_xor_sync(~0U, x, 2));
}
template <int kScores>
float row_max(const float (&x)[kScores], int h) {
  float best = -INFINITY;
  for (int i = 2 * h; i < kScores; i += 4) best = std::fmax(best, std::fmax(x[i], x[i + 1]));
  return quad_max(best);
}
/// Lane l of a quad gives x[i] to lane i and gets x[l] of lane i as its x[i].
inline void quad_transpose(std::uint32_t (&x)[4]) {
  auto& block = emulated::Block::current();
  const unsigned lane = block.thread() % 32;
  std::uint32_t of_others[4];
  for (unsigned i = 0; i < 4; ++i) {
    const auto& held = block.exchange(x[i]);
    if (i != lane % 4) continue;
    for (unsigned j = 0; j < 4; ++j) of_others[j] = static_cast<std::uint32_t>(held[lane / 4 * 4 + j]);
  }
  std::memcpy(x, of_others, sizeof(x));
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

/// Lane l gives the address of row l % 8 of matrix l / 8, which takes column l % 8 of that matrix: of each row i the
/// half l % 2 of what lane 4 i + l % 8 / 2 holds.
inline void stmatrix_x4_transposed(std::uint32_t to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                   std::uint32_t d) {
  auto& block = emulated::Block::current();
  const unsigned lane = block.thread() % 32, matrix = lane / 8, column = lane % 8;
  const std::uint32_t own[4] = {a, b, c, d};
  for (unsigned m = 0; m < 4; ++m) {
    const auto held = block.exchange(own[m]);
    if (m != matrix) continue;
    for (unsigned i = 0; i < 8; ++i) {
      const auto x = static_cast<std::uint16_t>(held[4 * i + column / 2] >> (16 * (column % 2)));
      std::memcpy(block.shared_at(to + 2 * i, 2), &x, 2);
    }
  }
  block.meet_warp();
}

/// Lane 8 m + i gives the address of row i of matrix m; lane l gets of it elements 2 (l % 4) and the next of row l / 4.
inline void ldmatrix_x4(std::uint32_t (&to)[4], std::uint32_t from) {
  auto& block = emulated::Block::current();
  const auto addresses = block.exchange(from);
  const unsigned lane = block.thread() % 32;
  if (from % 16 != 0) throw std::logic_error("a row of a matrix that is not aligned");
  for (unsigned m = 0; m < 4; ++m) {
    const auto at = static_cast<std::uint32_t>(addresses[8 * m + lane / 4]) + 4 * (lane % 4);
    std::memcpy(&to[m], block.shared_at(at, 4), 4);
  }
}
/// The same, each matrix transposed: elements l / 4 of rows 2 (l % 4) and the next.
inline void ldmatrix_x4_transposed(std::uint32_t (&to)[4], std::uint32_t from) {
  auto& block = emulated::Block::current();
  const auto addresses = block.exchange(from);
  const unsigned lane = block.thread() % 32;
  if (from % 16 != 0) throw std::logic_error("a row of a matrix that is not aligned");
  for (unsigned m = 0; m < 4; ++m) {
    std::uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const auto at = static_cast<std::uint32_t>(addresses[8 * m + 2 * (lane % 4) + i]) + 2 * (lane / 4);
      std::memcpy(&pair[i], block.shared_at(at, 2), 2);
    }
    to[m] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
}
}  // namespace flash_mla::sm90
