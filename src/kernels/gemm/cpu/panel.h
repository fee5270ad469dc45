#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/tensor.h"

// Products with weights that lie in panels of 64 output features. A row's sums are taken over the depth from
// first to last whatever its neighbours, so they do not depend on the other rows of the batch.

namespace flash_mla::cpu::panel {

inline constexpr std::int64_t kColumns = 64;
/// Depth that is multiplied at a time: an expanded panel of it stays in the first-level cache.
inline constexpr std::int64_t kDepth = 256;

/// Rows times one panel, `depth` of them at a time: y = sum * scale + bias, or with `accumulate` y += that.
struct Block {
  const std::byte* x;
  std::ptrdiff_t x_stride;   ///< bytes between rows
  std::int64_t rows, depth;  ///< depth: at most kDepth and a multiple of the kernel's depth_multiple
  /// (rows, kColumns): where the sums wait between the depths of a product that has several.
  float* sums;
  bool first, last;  ///< of the depths
  /// Weights that are wanted next, or null: they are fetched while these are multiplied.
  const std::byte* ahead;
  std::int64_t ahead_bytes;

  std::byte* y;
  std::ptrdiff_t y_stride;
  DType y_dtype;
  std::int64_t columns;  ///< of the panel that exist
  const float* scale;    ///< (columns) or null for 1
  const float* bias;     ///< (columns) or null
  bool accumulate;
};

/// What the codes of a packed panel stand for: two's complement in [-127, 127], e4m3, or 4 bits for -8 to 7.
enum class Codes { kInt8, kE4m3, kInt4 };

/// Bytes of that many codes of a packed panel.
constexpr std::int64_t packed_bytes(Codes codes, std::int64_t count) {
  return codes == Codes::kInt4 ? count / 2 : count;
}

/// One instruction set's way to multiply rows of one dtype. Plain panels begin at multiples of 64 bytes.
struct Kernel {
  std::int64_t depth_multiple;
  std::size_t plain_element;  ///< bytes of an element of a plain panel
  /// Rows up to which multiply_packed is quicker than to expand first.
  std::int64_t few_rows;
  /// `values` (kColumns, depth), rows `stride` apart, rounded to the elements of a plain panel.
  void (*pack_plain)(const float* values, std::int64_t stride, std::int64_t depth, void* plain);
  /// The same with a byte of code each, to packed_bytes(codes, kColumns * depth).
  void (*pack)(Codes codes, const std::uint8_t* values, std::int64_t stride, std::int64_t depth,
               void* packed);
  /// A packed panel to a plain one: the codes' values, exactly.
  void (*expand)(Codes codes, const void* packed, std::int64_t depth, void* plain);
  void (*multiply)(const Block& block, const void* plain);
  /// The same, to the bit, on a packed panel and at most few_rows rows.
  void (*multiply_packed)(Codes codes, const Block& block, const void* packed);
};

/// Whether this machine has, and may use, avx512_bf16_kernel().
bool multiplies_bfloat16_pairs();

/// For rows of `dtype` (float32 or bfloat16), on this machine.
const Kernel& select_kernel(DType dtype);

/// By dot products of bf16 pairs: AVX512_BF16 and AVX512_VBMI.
const Kernel& avx512_bf16_kernel();
/// In fp32 arithmetic, for every machine.
const Kernel& highway_kernel(DType dtype);

}  // namespace flash_mla::cpu::panel
