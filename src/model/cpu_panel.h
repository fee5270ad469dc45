#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/tensor.h"

// Products with weights that lie in panels of 64 output features. A row's sums are taken over the depth from
// first to last whatever its neighbours, so they do not depend on the other rows of the batch.

namespace flash_mla::model::panel {

inline constexpr std::int64_t kColumns = 64;
/// Depth that is multiplied at a time: an expanded panel of it stays in the first-level cache.
inline constexpr std::int64_t kDepth = 256;

/// What becomes of the sums of one row: y = sum * scale + bias, added to y with `accumulate`.
struct Finish {
  const float* scale;  ///< (count)
  const float* bias;   ///< (count) or null
  std::int64_t count;  ///< columns of the panel that exist
  DType dtype;         ///< of y
  bool accumulate;
};

/// One instruction set's way to multiply rows of one dtype. `depth` is at most kDepth and a multiple of
/// depth_multiple.
struct Kernel {
  std::int64_t depth_multiple;
  std::size_t expanded_element;  ///< bytes of an element of an expanded panel
  /// Rows up to which multiply_int8 is quicker than to expand first.
  std::int64_t few_rows;
  /// `values` (kColumns, depth), rows `stride` apart, each in [-127, 127], to kColumns * depth bytes.
  void (*pack)(const std::int8_t* values, std::int64_t stride, std::int64_t depth, std::uint8_t* packed);
  void (*expand)(const std::uint8_t* packed, std::int64_t depth, void* expanded);
  /// sums (rows, kColumns) = or with `add` += x · panel; rows of x are `stride` bytes apart.
  void (*multiply)(const std::byte* x, std::ptrdiff_t stride, std::int64_t rows, const void* expanded,
                   std::int64_t depth, float* sums, bool add);
  /// The same, to the bit, on a packed panel and at most few_rows rows.
  void (*multiply_int8)(const std::byte* x, std::ptrdiff_t stride, std::int64_t rows,
                        const std::uint8_t* packed, std::int64_t depth, float* sums, bool add);
  void (*finish)(const float* sums, const Finish& finish, void* y);
};

/// For rows of `dtype` (float32 or bfloat16), on this machine.
const Kernel& select_kernel(DType dtype);

/// By dot products of bf16 pairs: AVX512_BF16 and AVX512_VBMI.
const Kernel& avx512_bf16_kernel();
/// In fp32 arithmetic, for every machine.
const Kernel& highway_kernel(DType dtype);

}  // namespace flash_mla::model::panel
