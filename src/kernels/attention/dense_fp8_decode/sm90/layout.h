#pragma once

// Where things lie in dense decode over FP8 caches: rows in shared memory, and which of a product's rows, columns and
// k's a lane takes from them. Free of CUDA: tests/kernels/dense_fp8_layout_test.cpp plays the products through on the
// CPU with these very functions.
//
// wgmma takes A from registers: lane l = 4 g + t of warp w holds rows 16 w + g and + 8 of 64, and of 16 k's 2 t, 2 t + 1,
// 2 t + 8 and 2 t + 9. Which key or column a row is, and which element a k is, is ours to say as long as both factors
// agree. It is said so that a lane's bytes lie together (16 columns of a key in one load, 8 columns of each of four keys
// in another) and that no load has bank conflicts.

#include "flash_mla/kv_cache.h"
#include "kernels/attention/dense_decode/sm90/params.h"
#include "kv/format.h"

namespace flash_mla::sm90::dense_fp8 {

inline constexpr int kStages = 3;       ///< tiles of bytes in shared memory
inline constexpr int kScaleTile = 128;  ///< columns of V with a scale of their own
inline constexpr int kScaleTiles = kHeadDimV / kScaleTile;
inline constexpr int kChunkColumns = 64;
inline constexpr int kChunks = kHeadDim / kChunkColumns;

/// A row of the cache in shared memory. Rows that follow each other are 16 or 80 bytes apart modulo 128, which
/// key_of_position counts on.
template <KvFormat kFormat>
struct RowOf;
template <>
struct RowOf<KvFormat::kFp8V32> : kv::Fp8V32 {
  static constexpr int kBytes = kTokenBytes, kPitch = kBytes;
  static constexpr bool kScaled = true;  ///< four scales to a row, and the rope part is bfloat16
};
template <>
struct RowOf<KvFormat::kFp8Tensor> : kv::Fp8Tensor {
  static constexpr int kBytes = kTokenBytes, kPitch = kBytes + 16;
  static constexpr bool kScaled = false;
};
inline constexpr int kMaxPitch = RowOf<KvFormat::kFp8V32>::kPitch;

/// The key, of 16, that is row and k number `position` of a product: 0 12 2 14 4 8 6 10 1 13 3 15 5 9 7 11. Lanes that
/// load together 16 bytes at a time take positions 2 i and 2 i + 1, which are 12 or 4 rows apart; those that load 8
/// bytes take positions 2 i, i = 0 to 3, or 2 i + 1, which are two rows apart from each other.
constexpr int key_of_position(int position) {
  const int half = position / 8, pair = position % 8 / 2;
  return half + (position % 2 == 0 ? 2 * pair : 8 + (2 * pair + 4) % 8);
}
/// The key, of a tile's 64.
constexpr int key_of_row(int row) { return row / 16 * 16 + key_of_position(row % 16); }

/// First of the 16 columns of a chunk that lane t of a quad takes of a key.
constexpr int key_column(int t) { return 16 * t; }
/// k's of slice i (of four, 16 k's each) are the lanes' columns 4 i to 4 i + 3: where word `word` (two columns) of a
/// chunk of Q, as the products want it, comes from.
constexpr int query_word(int word) {
  const int slice = word / 8, t = word % 4, second = word % 8 / 4;
  return key_column(t) / 2 + 2 * slice + second;
}

/// Position of the j-th (of four) of lane t's keys in a slice of 16.
constexpr int value_position(int t, int j) { return 2 * t + j % 2 + j / 2 * 8; }
/// First of the 8 columns of V that a lane of warp `warp` of warpgroup `wg` takes: two in each of four products of 64
/// columns, 2 i and 2 i + 1 as rows g and g + 8 of product i.
constexpr int value_column(int wg, int warp, int g) { return wg * kHeadDimV / 2 + (warp * 8 + g) * 8; }

/// Of sums by head, lane 4 g + t keeps those of heads 8 n + 2 t and the next one, n = kept_group(g).
template <int kHeads>
constexpr int kept_group(int g) {
  return g / (64 / kHeads);
}

/// Heads that a CTA's products take for so many query rows.
constexpr int heads_for(int rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

}  // namespace flash_mla::sm90::dense_fp8
