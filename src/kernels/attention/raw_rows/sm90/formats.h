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

/// 656-byte rows. A block of 128 columns has a scale, any float32. Against 2^-6 of the power of two below the key's largest
/// it is fp16 (`kTable`), which an element is multiplied with where it is widened; that power, one number for a key, is
/// applied to the key's scores, and in P.
struct V32Rows : kv::Fp8V32 {
  static constexpr int kHeadDim = 576, kE4m3Chunks = 8, kBytes = kTokenBytes, kStride = kBytes;
  using Scales = uint4;                                  ///< of a key, as the cache has them
  static constexpr int kScaleBlocks = kScales;           ///< of a slot's table
  static constexpr int kWeights = 1;                     ///< tiles of P
  static constexpr bool kTable = true, kHasRope = true;  ///< a rope part of 16-bit elements behind e4m3
  static constexpr float kLeastExponent = -100.0f;       ///< smaller scales than 2 to that count as it
  /// Which of the table's blocks lane c of four meets in the i-th two chunks.
  __device__ static constexpr int scale_block(int i, int) { return i; }
  /// Is tile `i` of P bfloat16, not float16?
  static constexpr bool is_bf16_weight(int, bool) { return false; }
};

/// V4's rows of 576 bytes. Scales are powers of two, one for 64 columns; the rest is as in V32Rows. The rope part belongs
/// to V; its products are in bfloat16.
struct V4Rows : kv::Fp8V4 {
  static constexpr int kHeadDim = 512, kE4m3Chunks = 7, kBytes = kRowBytes, kStride = kBytes + 16;
  using Scales = uint2;
  static constexpr int kScaleBlocks = 8;  ///< the last is not used
  static constexpr int kWeights = 2;      ///< for e4m3, and for the rope part
  static constexpr bool kTable = true, kHasRope = true;
  static constexpr float kLeastExponent =
      -20.0f;  ///< the rope part's P is divided by it and must not overflow
  __device__ static constexpr int scale_block(int i, int c) { return i == 3 ? 6 : 2 * i + c / 2; }
  static constexpr bool is_bf16_weight(int i, bool) { return i == 1; }
};

/// Of rows without scales of their own.
struct NoScales {};

/// Rows of kDim 16-bit elements of Q's type.
template <int kDim>
struct WideRows {
  static constexpr int kHeadDim = kDim, kE4m3Chunks = 0, kBytes = 2 * kDim, kStride = kBytes + 16;
  using Scales = NoScales;
  static constexpr int kWeights = 1;
  static constexpr bool kTable = false, kHasRope = false;
  static constexpr float kLeastExponent = 0.0f;
  static constexpr bool is_bf16_weight(int, bool bf16_queries) { return bf16_queries; }
};

/// 576 e4m3 under one scale, which is the caller's to apply.
struct TensorRows : kv::Fp8Tensor {
  static constexpr int kHeadDim = 576, kE4m3Chunks = 9, kBytes = kTokenBytes, kStride = kBytes + 16;
  using Scales = NoScales;
  static constexpr int kWeights = 1;
  static constexpr bool kTable = false, kHasRope = false;
  static constexpr float kLeastExponent = 0.0f;
  static constexpr bool is_bf16_weight(int, bool) { return false; }
};

}  // namespace flash_mla::sm90::raw_rows
