#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numbers>

#include "kernels/attention/gqa/problem.h"

namespace flash_mla::sm90::prefill {

inline constexpr int kTileRows = 128;  ///< query rows of an item, half of them for each consumer warpgroup

/// What the kernel needs beside the tensor maps. Strides count elements.
struct Params {
  int num_seqs, num_heads;
  int causal;
  float scale_log2;  ///< softmax_scale * log2(e)
  const std::int32_t *cu_seqlens_q, *cu_seqlens_k;
  /// Items taken beyond the first of every CTA; zero at the start. Null if there are no more items than CTAs.
  std::int32_t* taken;

  void* out;
  std::int64_t out_stride_token, out_stride_head;
  float* lse;  ///< may be null
  std::int64_t lse_stride_head, lse_stride_token;
};

/// The same for keys and values of their own, with all that gqa_attention knows but masks and slopes. Lengths, windows and
/// pages are in `problem`.
///
/// The rows of a tile are `pack` heads of a group for each query, query by query, so that few queries fill it; num_heads
/// counts such blocks of heads. pack is a power of two: the group, if that is one, else 1.
struct GroupedParams : Params {
  flash_mla::gqa::Problem problem;
  int pack_log2;
  /// At most a billion, so that sums with positions stay in 32 bits.
  int window_left, window_right;
  /// Soft cap c: scores x become c tanh(softmax_scale x / c); then scale_log2 is c log2(e) and this 2 log2(e) softmax_scale / c.
  /// 0: none.
  float cap_scale;
  /// Keys that one copy takes: those of a tile, or of a page if it has fewer.
  int copy_keys;

  /// Into how many parts an item's tiles of keys are divided (kMaxSplits at most), where there are fewer items than multiprocessors; 1: results go
  /// to out. Else (splits, total_q, h_q, d_v) averages and (splits, total_q, h_q) log2 of their sums, -inf where a row has no
  /// weight in the part; grouped_combine puts them together.
  int splits;
  std::int64_t total_q;
  float *partial_out, *partial_lse;
};

inline constexpr int kMaxSplits = 32;

/// Of the heads of a group that share a tile.
constexpr int pack_log2(unsigned group) {
  return std::has_single_bit(group) && group <= kTileRows ? std::countr_zero(group) : 0;
}

/// Without `taken`, and with one split.
inline GroupedParams grouped_params(const flash_mla::gqa::Problem& problem, int copy_keys) {
  constexpr std::int64_t kFar = 1'000'000'000;
  constexpr float kLog2e = std::numbers::log2e_v<float>;
  GroupedParams p{};
  p.problem = problem;
  p.num_seqs = problem.batch;
  p.pack_log2 = pack_log2(static_cast<unsigned>(problem.group));
  p.num_heads = problem.h_q >> p.pack_log2;
  p.window_left = static_cast<int>(std::min(problem.window_left, kFar));
  p.window_right = static_cast<int>(std::min(problem.window_right, kFar));
  p.scale_log2 = (problem.soft_cap > 0 ? problem.soft_cap : problem.scale) * kLog2e;
  p.cap_scale = problem.soft_cap > 0 ? 2 * kLog2e * problem.scale / problem.soft_cap : 0.0f;
  p.copy_keys = copy_keys;
  p.splits = 1;
  p.out = problem.out;
  p.out_stride_token = problem.out_strides.token;
  p.out_stride_head = problem.out_strides.head;
  p.lse = problem.lse;
  p.lse_stride_head = problem.lse_head_stride;
  p.lse_stride_token = problem.lse_token_stride;
  return p;
}

/// MLA's un-absorbed heads: keys of 128 columns for every head, and 64 that all heads share; values of 128.
struct LatentHeads {
  using Params = prefill::Params;
  static constexpr bool kGrouped = false, kSplits = false;
  static constexpr int kHeadDim = 192, kHeadDimNope = 128, kHeadDimV = 128;
  static constexpr int kTileKeys = 128, kStages = 2;
  /// Steps of 16 columns of Q that stay in registers; the others are read from shared memory by every product.
  static constexpr int kRegisterSteps = 4;
};

/// Keys and values of their own, for each head or for a group of heads; as many stages as there is room for, four at most.
/// kSplits_: GroupedParams::splits is more than 1.
template <int kDqk, int kDv, bool kSplits_>
struct GroupedHeads {
  using Params = GroupedParams;
  static constexpr bool kGrouped = true, kSplits = kSplits_;
  static constexpr int kHeadDim = kDqk, kHeadDimV = kDv;
  /// Scores of 128 keys and an output of 256 columns are more than the registers hold.
  static constexpr int kTileKeys = kDv > 128 ? 64 : 128;
  static constexpr int kRoom = (224 << 10) - kTileRows * kDqk * 2;
  static constexpr int kFit = kRoom / (kTileKeys * (kDqk + kDv) * 2);
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  static constexpr int kRegisterSteps = kDv > 128 ? 0 : 4;
  static_assert(kStages >= 2);
};

}  // namespace flash_mla::sm90::prefill
