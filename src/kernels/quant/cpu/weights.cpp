#include "kernels/quant/cpu/weights.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/element.h"
#include "base/fp8.h"
#include "base/parallel.h"
#include "base/quantized.h"

namespace flash_mla::cpu {
namespace {

constexpr std::int64_t kWorthThreads = 1 << 16;

int threads_for(std::int64_t weights) { return weights >= kWorthThreads ? default_threads() : 1; }

float largest(const float* x, std::int64_t count) {
  // Lanes, since a maximum of floats is not taken out of order otherwise.
  float lanes[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int l = 0; l < 8; ++l) lanes[l] = std::max(lanes[l], std::abs(x[i + l]));
  }
  for (; i < count; ++i) lanes[0] = std::max(lanes[0], std::abs(x[i]));
  return *std::max_element(lanes, lanes + 8);
}

/// to_e4m3 of numbers of at most 448, without a branch.
std::uint8_t e4m3_code(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  const std::uint32_t normal = (magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) -
                                  std::bit_cast<std::uint32_t>(0x1p14f);
  return static_cast<std::uint8_t>((bits >> 24 & 0x80u) | (magnitude < 0x3C800000u ? subnormal : normal));
}

/// Rounded to the nearest whole number, ties to even, of |x| < 2^22.
float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

float int4_of(float x, float inverse) { return std::min(std::max(round_even(x * inverse), -8.0f), 7.0f); }

float squared_error(const float* x, std::int64_t count, float scale) {
  const float inverse = 1 / scale;
  float lanes[8] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const float difference = x[i] - int4_of(x[i], inverse) * scale;
    lanes[i % 8] += difference * difference;
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

float int4_scale(const float* x, std::int64_t count) {
  constexpr float kDivisors[] = {7.5f, 7.0f, 8.0f, 8.5f, 9.0f, 9.75f};
  const float amax = largest(x, count);
  float best = 1, best_error = INFINITY;
  for (const float divisor : kDivisors) {
    const float scale = to_float(to_bf16(amax / divisor));
    // Below the smallest normal number a scale loses its digits, and its inverse may be infinite.
    if (!(scale >= 0x1p-120f)) return 1;
    const float error = squared_error(x, count, scale);
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

}  // namespace

void quantise_fp8_blocks(const float* weight, std::int64_t rows, std::int64_t columns, bool powers,
                         std::uint8_t* codes, float* scales) {
  const std::int64_t block_rows = (rows + kFp8Block - 1) / kFp8Block;
  const std::int64_t block_columns = (columns + kFp8Block - 1) / kFp8Block;
  parallel_for(block_rows * block_columns, threads_for(rows * columns), [&](std::int64_t block) {
    const std::int64_t row = block / block_columns * kFp8Block, column = block % block_columns * kFp8Block;
    const std::int64_t end = std::min(rows, row + kFp8Block), width = std::min(columns - column, kFp8Block);
    float amax = 0;
    for (std::int64_t r = row; r < end; ++r)
      amax = std::max(amax, largest(weight + r * columns + column, width));
    float scale = amax / kE4m3Max;
    if (powers) scale = next_power_of_two(scale);
    if (!(scale >= std::numeric_limits<float>::min())) scale = 1;  // what is left rounds to zero
    scales[block] = scale;
    for (std::int64_t r = row; r < end; ++r) {
      const float* from = weight + r * columns + column;
      std::uint8_t* to = codes + r * columns + column;
      for (std::int64_t c = 0; c < width; ++c) {
        to[c] = e4m3_code(std::min(std::max(from[c] / scale, -kE4m3Max), kE4m3Max));
      }
    }
  });
}

void quantise_int4(const float* weight, std::int64_t rows, std::int64_t columns, std::int64_t group,
                   std::uint8_t* codes, float* scales) {
  const std::int64_t groups = (columns + group - 1) / group;
  parallel_for(rows, threads_for(rows * columns), [&](std::int64_t row) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = row * columns + g * group, count = std::min(group, columns - g * group);
      const float scale = int4_scale(weight + first, count);
      scales[row * groups + g] = scale;
      const float inverse = 1 / scale;
      for (std::int64_t i = first; i < first + count; ++i) {
        codes[i] = static_cast<std::uint8_t>(static_cast<int>(int4_of(weight[i], inverse)) + 8);
      }
    }
  });
}

}  // namespace flash_mla::cpu
