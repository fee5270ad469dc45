#pragma once

namespace flash_mla::sm90 {

inline constexpr int kCombineWarps = 8;

/// How the eight warps of a block divide 32 groups of 8 columns and a request's splits. Finer shapes have
/// shorter chains of loads and more blocks.
enum class CombineShape {
  kFine,    ///< a block takes one group of columns, a warp every eighth split of it
  kMedium,  ///< four groups; a warp takes two of them and every fourth split
  kCoarse,  ///< all groups; a warp takes four of them and all splits
};
constexpr int split_warps(CombineShape s) {
  return s == CombineShape::kFine ? 8 : s == CombineShape::kMedium ? 4 : 1;
}
constexpr int warp_groups(CombineShape s) {
  return s == CombineShape::kFine ? 1 : s == CombineShape::kMedium ? 2 : 4;
}
/// Splits of which a warp holds its share in shared memory at a time: what 48 KB take.
constexpr int warp_splits(CombineShape s) {
  return s == CombineShape::kFine ? 9 : s == CombineShape::kMedium ? 5 : 2;
}
constexpr int column_chunks(CombineShape s) { return 32 / (kCombineWarps / split_warps(s) * warp_groups(s)); }

}  // namespace flash_mla::sm90
