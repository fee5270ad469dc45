#pragma once

#include <cstdint>

#include "flash_mla/tensor.h"

namespace flash_mla {

/// Element i of a vector of int32 or int64.
inline std::int64_t integer_at(const TensorView& t, std::int64_t i) {
  return t.dtype == DType::kInt64 ? t.ptr<const std::int64_t>()[i * t.stride(0)]
                                  : t.ptr<const std::int32_t>()[i * t.stride(0)];
}

/// Writes the element that lies `at` elements behind the first.
inline void put_integer(const TensorView& t, std::int64_t at, std::int64_t x) {
  if (t.dtype == DType::kInt64) {
    t.ptr<std::int64_t>()[at] = x;
  } else {
    t.ptr<std::int32_t>()[at] = static_cast<std::int32_t>(x);
  }
}

}  // namespace flash_mla
