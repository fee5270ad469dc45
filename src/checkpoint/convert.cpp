#include "checkpoint/convert.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace flash_mla::model {
namespace {

float from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | magnitude);  // inf, NaN
  // Exponents are biased by 15 there and by 127 here; the product also normalises subnormals.
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

/// E4M3 as OCP's 8-bit floating point specification has it: bias 7, no infinities, NaN where all bits are
/// set.
std::array<float, 256> make_float8_table() {
  std::array<float, 256> table{};
  for (int bits = 0; bits < 256; ++bits) {
    const int exponent = (bits >> 3) & 15;
    const int mantissa = bits & 7;
    float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    if ((bits & 0x7f) == 0x7f) value = std::numeric_limits<float>::quiet_NaN();
    table[static_cast<std::size_t>(bits)] = bits < 128 ? value : -value;
  }
  return table;
}

template <typename Element, typename Convert>
void convert_all(const std::byte* data, std::int64_t first, std::int64_t count, float* out,
                 const Convert& convert) {
  data += first * static_cast<std::int64_t>(sizeof(Element));
  for (std::int64_t i = 0; i < count; ++i) {
    Element bits;
    std::memcpy(&bits, data + i * static_cast<std::int64_t>(sizeof(Element)), sizeof(Element));
    out[i] = convert(bits);
  }
}

}  // namespace

void to_float32(const WeightView& view, float* out) { to_float32(view, 0, view.elements(), out); }

void to_float32(const WeightView& view, std::int64_t first, std::int64_t count, float* out) {
  static const std::array<float, 256> float8 = make_float8_table();
  switch (view.type) {
    case WeightType::kFloat32:
      return convert_all<float>(view.data, first, count, out, [](float x) { return x; });
    case WeightType::kFloat16:
      return convert_all<std::uint16_t>(view.data, first, count, out, from_float16);
    case WeightType::kBFloat16:
      return convert_all<std::uint16_t>(view.data, first, count, out, from_bfloat16);
    case WeightType::kFloat8E4M3:
      return convert_all<std::uint8_t>(view.data, first, count, out,
                                       [](std::uint8_t x) { return float8[x]; });
  }
}

}  // namespace flash_mla::model
