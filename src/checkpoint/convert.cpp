#include "checkpoint/convert.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/element.h"

namespace flash_mla::checkpoint {
namespace {

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
    Element x;
    std::memcpy(&x, data + i * static_cast<std::int64_t>(sizeof(Element)), sizeof(Element));
    out[i] = convert(x);
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
      return convert_all<Fp16>(view.data, first, count, out, [](Fp16 x) { return to_float(x); });
    case WeightType::kBFloat16:
      return convert_all<Bf16>(view.data, first, count, out, [](Bf16 x) { return to_float(x); });
    case WeightType::kFloat8E4M3:
      return convert_all<std::uint8_t>(view.data, first, count, out,
                                       [](std::uint8_t x) { return float8[x]; });
  }
}

}  // namespace flash_mla::checkpoint
