#pragma once

// Tensor maps, which tell the copy engine how a tensor lies in memory.

#include <cuda.h>

#include <array>
#include <cstdint>
#include <span>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla::sm90 {

/// One dimension of a tensor map: its size, the bytes from one index to the next (none for the innermost),
/// and how much of it a box covers.
struct MapDim {
  std::int64_t size;
  std::int64_t stride_bytes;
  int box;
};

/// A tensor map of 16-bit elements, innermost dimension (64 contiguous columns) first, with 128-byte swizzle.
/// Throws InvalidArgument naming `name` for a layout that none can describe.
FLASH_MLA_API CUtensorMap encode_tensor_map(const char* name, const TensorView& t,
                                            std::span<const MapDim> dims);
template <std::size_t kRank>
CUtensorMap tensor_map(const char* name, const TensorView& t, const std::array<MapDim, kRank>& dims) {
  return encode_tensor_map(name, t, dims);
}

/// Throws InvalidArgument for data or outer strides that are not multiples of 16 bytes.
void require_stride(const TensorView& t, const char* name);

}  // namespace flash_mla::sm90
