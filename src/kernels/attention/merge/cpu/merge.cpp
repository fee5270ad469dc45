#include "kernels/attention/merge/cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include "base/element.h"

namespace flash_mla::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
T* row_of(const TensorView& t, std::int64_t b, std::int64_t i, std::int64_t h) {
  return t.ptr<T>() + b * t.stride(0) + i * t.stride(1) + h * t.stride(2);
}
float& lse_of(const TensorView& t, std::int64_t b, std::int64_t i, std::int64_t h) {
  return t.ptr<float>()[b * t.stride(0) + h * t.stride(1) + i * t.stride(2)];
}

/// Both conventions for a state without keys become -inf.
float empty_as_minus_inf(float lse) { return lse == kInfinity ? -kInfinity : lse; }

/// x * weight, where a weight of zero ignores x altogether: an empty state may hold NaN.
float weighted(float x, float weight) { return weight == 0.0f ? 0.0f : x * weight; }

template <class T>
void merge_row(const T* a, const T* b, T* out, std::int64_t d, float weight_a, float weight_b) {
  for (std::int64_t c = 0; c < d; ++c) {
    out[c] = from_double<T>(weighted(static_cast<float>(to_float(a[c])), weight_a) +
                            weighted(static_cast<float>(to_float(b[c])), weight_b));
  }
}

}  // namespace

void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                  const TensorView& lse_b, const TensorView& out, const TensorView& lse, LseBase base,
                  const TensorView& mask) {
  // Everything in base 2: exp2 and log2 are exact for powers of two and no slower.
  const float to_base2 = base == LseBase::kE ? std::numbers::log2e_v<float> : 1.0f;
  const float from_base2 = base == LseBase::kE ? std::numbers::ln2_v<float> : 1.0f;
  for (std::int64_t b = 0; b < out.size(0); ++b) {
    for (std::int64_t i = 0; i < out.size(1); ++i) {
      if (mask.defined() && mask.ptr<const std::uint8_t>()[b * mask.stride(0) + i * mask.stride(1)] == 0)
        continue;
      for (std::int64_t h = 0; h < out.size(2); ++h) {
        const float x = empty_as_minus_inf(lse_of(lse_a, b, i, h));
        const float y = empty_as_minus_inf(lse_of(lse_b, b, i, h));
        // Differences are taken before the change of base, which would round large values.
        const float highest = std::max(x, y);
        const bool none = x == -kInfinity && y == -kInfinity;  // not `highest`: std::max may drop a NaN
        const float power_a = none ? 0.0f : std::exp2((x - highest) * to_base2);
        const float power_b = none ? 0.0f : std::exp2((y - highest) * to_base2);
        const float sum = power_a + power_b;
        const float factor = none ? 0.0f : 1.0f / sum;
        visit_float_type(out.dtype, [&](auto element) {
          using T = decltype(element);
          if constexpr (!std::is_same_v<T, double>) {
            merge_row(row_of<const T>(out_a, b, i, h), row_of<const T>(out_b, b, i, h),
                      row_of<T>(out, b, i, h), out.size(3), power_a * factor, power_b * factor);
          }
        });
        lse_of(lse, b, i, h) = none ? kInfinity : highest + std::log2(sum) * from_base2;
      }
    }
  }
}

}  // namespace flash_mla::cpu
