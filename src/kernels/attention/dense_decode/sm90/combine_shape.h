#pragma once

#include <array>

namespace flash_mla::sm90 {

inline constexpr int kCombineWarps = 8;
inline constexpr int kColumnGroups = 32;  ///< of 8 columns each: half of O's columns

/// How the warps of a block divide columns and a request's splits.
struct CombineShape {
  int groups;       ///< groups of columns that a block takes
  int split_warps;  ///< warps that share a group
  int lanes = 32;   ///< lanes that take a split's share of a group: all 16 rows of it, or 16 for 8 of them
  /// What shares a group takes every so many-th split each.
  constexpr int split_step() const { return split_warps * 32 / lanes; }
  constexpr int warp_groups() const { return groups * split_warps / kCombineWarps; }
  constexpr int chunks() const { return kColumnGroups / groups * 32 / lanes; }
  bool operator==(const CombineShape&) const = default;
};

/// From fine to coarse: finer shapes have shorter chains of loads and more blocks.
inline constexpr std::array<CombineShape, 7> kCombineShapes{
    {{1, 8, 16}, {1, 8}, {2, 4}, {4, 4}, {8, 2}, {16, 2}, {32, 1}}};
/// What batch-invariant mode uses for every batch: the order of summation depends on the shape.
inline constexpr CombineShape kFixedCombineShape = kCombineShapes[3];

/// Splits whose O a warp has on its way at a time: 32 to 48 KB a block, what a multiprocessor has to have on
/// its way to read L2 at full rate.
constexpr int ring_splits(CombineShape s) {
  constexpr std::array<int, 5> kByGroups{0, 9, 5, 0, 3};
  return s.groups == kColumnGroups ? 2 : kByGroups[static_cast<unsigned>(s.warp_groups())];
}
/// Splits whose weights are made at a time: where they suffice, as for a request cut over all multiprocessors
/// they do, their O arrives meanwhile.
constexpr int chunk_splits(CombineShape s) { return s.groups == kColumnGroups ? 48 : 144; }

}  // namespace flash_mla::sm90
