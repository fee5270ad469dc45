#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/tensor.h"

namespace flash_mla {

/// A window on device memory: rows of `columns` contiguous elements, `stride` elements apart. Not owning.
struct Matrix {
  std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0, columns = 0, stride = 0;

  std::byte* row(std::int64_t i) const {
    return data + i * stride * static_cast<std::int64_t>(dtype_size(dtype));
  }
  Matrix row_range(std::int64_t first, std::int64_t count) const {
    return {row(first), dtype, count, columns, stride};
  }
  Matrix column_range(std::int64_t first, std::int64_t count) const {
    return {data + first * static_cast<std::int64_t>(dtype_size(dtype)), dtype, rows, count, stride};
  }
};

}  // namespace flash_mla
