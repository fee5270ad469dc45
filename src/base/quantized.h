#pragma once

// Weights of few bits: an unsigned byte of code for each, and a scale for every row and group of columns.

#include <cstdint>

#include "base/fp8.h"

namespace flash_mla {

/// What a code stands for, before its scale.
enum class QuantizedType {
  kE4m3,  ///< base/fp8.h
  kInt4,  ///< code - 8, of a code in [0, 15]
};

/// weight[n][k] = value(code[n][k]) * scale[n][k / group].
struct QuantizedFormat {
  QuantizedType type{};
  std::int64_t group = 0;  ///< columns of one scale

  std::int64_t groups(std::int64_t columns) const { return (columns + group - 1) / group; }
  friend bool operator==(const QuantizedFormat&, const QuantizedFormat&) = default;
};

constexpr float quantized_value(QuantizedType type, std::uint8_t code) {
  return type == QuantizedType::kE4m3 ? to_float(E4m3{code}) : static_cast<float>(code) - 8.0f;
}

/// Group and magnitude of int4 as the W4A8 kernels of the field take them.
inline constexpr std::int64_t kInt4Group = 128;
/// Sides of a block with one scale in DeepSeek's FP8 checkpoints.
inline constexpr std::int64_t kFp8Block = 128;

}  // namespace flash_mla
