#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/gqa/problem.h"

namespace flash_mla::sm90::gqa {

using flash_mla::gqa::Problem;

inline constexpr int kTileRows = 16;     ///< query rows of a CTA
inline constexpr int kBlockTokens = 64;  ///< of a block of the schedule
inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;

/// What the kernels take. Rows of a sequence and key head are queries times heads of the group, query by query.
struct Params {
  Problem problem;
  int max_queries;  ///< of a sequence, as partial results are laid out
  float scale_log2;
  /// Null: every sequence is worked on as a whole.
  const std::int32_t* parts;       ///< (num_parts, 8), see DecodePart
  const std::int32_t* num_splits;  ///< (batch + 1)
  int num_parts;
  int split_blocks;  ///< 0, or batch-invariant mode: every sequence is cut at multiples of this
  bool token_rows;   ///< `parts` counts tokens

  /// Partial results of split sequences, normalised: (slots, max_queries, h_q, d_v), and the log2 of their sums, -inf where
  /// the row saw no key: (slots, max_queries, h_q). Let e = num_splits[r] - r: split 0 of sequence r lies in slot
  /// num_parts + e, split i > 0 in slot e + i - 1. With split_blocks, split i lies in slot num_splits[r] + i.
  float* partial_out;
  float* partial_lse;

  constexpr std::int64_t slot(std::int64_t r, std::int64_t before, std::int64_t split) const {
    if (split_blocks > 0) return before + split;
    return before - r + (split == 0 ? num_parts : split - 1);
  }
};

/// Shared memory of a CTA for head dimensions d_qk and d_v. Rows are 16 bytes longer than what they hold, so that the eight
/// rows of a matrix that a warp loads lie in different banks.
template <int kDqk, int kDv>
struct Shape {
  static_assert(kDqk % 16 == 0 && kDv % 16 == 0);
  /// Keys that a warp takes at a time. What a tile costs beside its products is the same for short and long rows.
  static constexpr int kTileKeys = kDqk <= 64 ? 32 : 16;
  static constexpr int kKeyPitch = 2 * kDqk + 16, kValuePitch = 2 * kDv + 16;
  static constexpr int kStageBytes = kTileKeys * (kKeyPitch + kValuePitch);
  /// Two CTAs to a multiprocessor where each still has three stages for every warp.
  static constexpr int kCtas = kStageBytes * kWarps * 3 <= 108 << 10 ? 2 : 1;
  static constexpr int kStages = ((kCtas == 2 ? 108 << 10 : 216 << 10) / (kStageBytes * kWarps)) < 8
                                     ? (kCtas == 2 ? 108 << 10 : 216 << 10) / (kStageBytes * kWarps)
                                     : 8;
  static constexpr int kQueryBytes = kTileRows * kKeyPitch;
  static constexpr int kStatsBytes = 2 * kWarps * kTileRows * 4;
  static constexpr int kSmem = kQueryBytes + kStatsBytes + kWarps * kStages * kStageBytes;
  static_assert(kStages >= 2);
  /// A warp's output, for the others to add up, fits its stages.
  static constexpr int kOutPitch = kDv + 4;
  static_assert(kTileRows * kOutPitch * 4 <= kStages * kStageBytes);
};

}  // namespace flash_mla::sm90::gqa
