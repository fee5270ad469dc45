#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/element.h"

namespace flash_mla::cpu {

/// `n` elements from element `at` of a tensor on, its last dimension contiguous: where they lie, or copied into `scratch`.
inline std::span<const float> floats(const TensorView& t, std::int64_t at, std::int64_t n,
                                     std::vector<float>& scratch) {
  const auto count = static_cast<std::size_t>(n);
  if (t.dtype == DType::kFloat32) return {t.ptr<const float>() + at, count};
  scratch.resize(count);
  visit_float_type(t.dtype, [&](auto element) {
    const auto* from = t.ptr<const decltype(element)>() + at;
    for (std::size_t i = 0; i < count; ++i) scratch[i] = static_cast<float>(to_float(from[i]));
  });
  return scratch;
}

}  // namespace flash_mla::cpu
