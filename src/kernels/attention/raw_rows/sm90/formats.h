#pragma once

// Formats of rows as their consumers see them: where a key's bytes lie in a row, in shared memory too, and which types
// the products with them have.
//
// K's columns come in chunks of 64, as Q's tile has them: first those of e4m3 (`kE4m3Chunks`), whose products are in
// fp16, then those of 16-bit elements, in Q's own type. In shared memory rows lie `kStride` bytes apart, 4 words more than
// a multiple of the 32 banks or 20.

#include <cuda_fp16.h>

#include <cstdint>

#include "kv/format.h"

namespace flash_mla::sm90::raw_rows {

/// Of rows whose producer has no scales to bring.
struct NoScales {};

/// 656-byte rows. A block of 128 columns has a scale of its own, any float32: it is applied in fp32, to the block's part
/// of a score, and to P, which is there once for each block.
struct V32Rows : kv::Fp8V32 {
  static constexpr int kHeadDim = 576, kE4m3Chunks = 8, kBytes = kTokenBytes, kStride = kBytes;
  using Scales = NoScales;                    ///< of a key, that a producer brings
  static constexpr int kKeyScales = kScales;  ///< factors of a key that P is multiplied with
  static constexpr int kWeights = kScales;    ///< tiles of P
  static constexpr bool kTable = false, kScaled = true, kHasRope = true;
  static constexpr float kLeastExponent = -100.0f;  ///< smaller scales than 2 to that count as it
  /// Is tile `i` of P bfloat16, not float16?
  static constexpr bool is_bf16_weight(int, bool) { return false; }
};

/// V4's rows of 576 bytes. Scales are powers of two, one for 64 columns: against 2^-6 of the key's largest they are fp16
/// (`kTable`), which an element is multiplied with where it is widened; the rest of them, one number for a key, is applied
/// as V32Rows' are. The rope part belongs to V; its products are in bfloat16.
struct V4Rows : kv::Fp8V4 {
  static constexpr int kHeadDim = 512, kE4m3Chunks = 7, kBytes = kRowBytes, kStride = kBytes + 16;
  using Scales = uint2;
  static constexpr int kScaleBlocks = 8;  ///< of a slot's table; the last is not used
  static constexpr int kKeyScales = 1;
  static constexpr int kWeights = 2;  ///< for e4m3, and for the rope part
  static constexpr bool kTable = true, kScaled = true, kHasRope = true;
  static constexpr float kLeastExponent =
      -20.0f;  ///< the rope part's P is divided by it and must not overflow
  /// Which of the table's blocks lane c of four meets in the i-th two chunks.
  __device__ static constexpr int scale_block(int i, int c) { return i == 3 ? 6 : 2 * i + c / 2; }
  static constexpr bool is_bf16_weight(int i, bool) { return i == 1; }
};

/// Rows of kDim 16-bit elements of Q's type.
template <int kDim>
struct WideRows {
  static constexpr int kHeadDim = kDim, kE4m3Chunks = 0, kBytes = 2 * kDim, kStride = kBytes + 16;
  using Scales = NoScales;
  static constexpr int kKeyScales = 0, kWeights = 1;
  static constexpr bool kTable = false, kScaled = false, kHasRope = false;
  static constexpr float kLeastExponent = 0.0f;
  static constexpr bool is_bf16_weight(int, bool bf16_queries) { return bf16_queries; }
};

/// 576 e4m3 under one scale, which is the caller's to apply.
struct TensorRows : kv::Fp8Tensor {
  static constexpr int kHeadDim = 576, kE4m3Chunks = 9, kBytes = kTokenBytes, kStride = kBytes + 16;
  using Scales = NoScales;
  static constexpr int kKeyScales = 0, kWeights = 1;
  static constexpr bool kTable = false, kScaled = false, kHasRope = false;
  static constexpr float kLeastExponent = 0.0f;
  static constexpr bool is_bf16_weight(int, bool) { return false; }
};

}  // namespace flash_mla::sm90::raw_rows
