#pragma once

// The list of items: sequences in order; of a sequence, groups of heads whose keys and values fit in L2
// together; of a group, row tiles from the last (which with a causal mask has most keys) to the first, each
// for all heads of the group. CTAs take items from the front, so that the short ones fill the gaps at the
// end.

#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/params.h"

namespace flash_mla::sm90::prefill {

/// L2 that a group's keys and values may take: H200 has 60 MB in two halves that may both hold a line.
inline constexpr int kGroupBytes = 24 << 20;

/// One tile of query rows of one head, with all the keys that they see.
template <bool kGrouped>
struct Item;
template <>
struct Item<false> {
  int head;         ///< -1: no more items
  int query;        ///< first row, counted over all sequences
  int rows;         ///< 1 to kTileRows
  int key;          ///< first key of the sequence, counted over all sequences
  int num_keys;     ///< of the sequence
  int first_limit;  ///< keys that row 0 sees; may be negative
  int num_tiles;    ///< of keys that the last row sees, and so at least as many as any other
};

/// Query i of a tile sees the keys from max(first_begin + i, 0) to min(first_limit + i, num_keys).
template <>
struct Item<true> {
  int head;   ///< block of heads; -1: no more items
  int query;  ///< of the first row, counted over all sequences
  int rows;   ///< 1 to kTileRows
  int seq;
  int num_keys;  ///< of the sequence
  int first_begin, first_limit;
  int split;                  ///< of GroupedParams::splits
  int first_tile, num_tiles;  ///< of keys that any row sees: the split's
};

/// What the item's last row sees ends here.
__device__ __forceinline__ int last_limit(const GroupedParams& p, const Item<true>& item) {
  return min(item.first_limit + ((item.rows - 1) >> p.pack_log2), item.num_keys);
}

/// Finds items by index, in rising order, for a whole warp: each lane looks after one of 32 sequences.
template <class C>
class WorkList {
  using Params = typename C::Params;

 public:
  __device__ explicit WorkList(const Params& params)
      : p_(params), lane_(static_cast<int>(threadIdx.x) % 32), total_(load()) {}

  __device__ Item<C::kGrouped> at(int index) {
    [[maybe_unused]] int split = 0;
    if constexpr (C::kSplits) {
      split = index % p_.splits;
      index /= p_.splits;
    }
    while (index >= before_ + total_ && first_seq_ + 32 < p_.num_seqs) {
      before_ += total_;
      first_seq_ += 32;
      total_ = load();
    }
    Item<C::kGrouped> item{};
    item.head = -1;
    if (index >= before_ + total_) return item;
    const std::uint32_t beyond = __ballot_sync(kAll, before_ + through_ > index);
    const int lane = __ffs(static_cast<int>(beyond)) - 1;
    const int q_begin = __shfl_sync(kAll, q_begin_, lane), q_length = __shfl_sync(kAll, q_length_, lane);
    if constexpr (C::kGrouped) {
      item.seq = first_seq_ + lane;
    } else {
      item.key = __shfl_sync(kAll, k_begin_, lane);
    }
    item.num_keys = __shfl_sync(kAll, k_length_, lane);
    const int row_tiles = tiles_of(q_length);
    const int at = index - before_ - (__shfl_sync(kAll, through_, lane) - row_tiles * p_.num_heads);
    const int group = heads_at_a_time(item.num_keys);
    const int first_head = at / (group * row_tiles) * group, in_group = at % (group * row_tiles);
    const int heads = min(group, p_.num_heads - first_head);
    const int tile = row_tiles - 1 - in_group / heads;
    item.head = first_head + in_group % heads;
    if constexpr (C::kGrouped) {
      const int before = tile * (kTileRows >> p_.pack_log2);  // queries
      item.query = q_begin + before;
      item.rows = min((q_length - before) << p_.pack_log2, kTileRows);
      const int position = item.num_keys - q_length + before;  // of the first query
      item.first_begin = position - p_.window_left;
      item.first_limit = position + p_.window_right + 1;
      const int begin = max(item.first_begin, 0), end = last_limit(p_, item);
      item.first_tile = begin / C::kTileKeys;
      item.num_tiles = end > begin ? (end + C::kTileKeys - 1) / C::kTileKeys - item.first_tile : 0;
      if constexpr (C::kSplits) {
        const int each = (item.num_tiles + p_.splits - 1) / p_.splits;
        item.split = split;
        item.first_tile += split * each;
        item.num_tiles = max(min(item.num_tiles - split * each, each), 0);
      }
    } else {
      item.query = q_begin + tile * kTileRows;
      item.rows = min(q_length - tile * kTileRows, kTileRows);
      item.first_limit = p_.causal ? item.num_keys - q_length + tile * kTileRows + 1 : item.num_keys;
      const int end = p_.causal ? item.first_limit + item.rows - 1 : item.num_keys;
      item.num_tiles = (max(end, 0) + C::kTileKeys - 1) / C::kTileKeys;
    }
    return item;
  }

 private:
  static constexpr std::uint32_t kAll = 0xFFFFFFFFu;
  // Query heads whose keys and values fit in L2 together.
  __device__ int heads_at_a_time(int keys) const {
    if constexpr (C::kGrouped) {
      const int fit = kGroupBytes / ((C::kHeadDim + C::kHeadDimV) * 2) / max(keys, 1);
      return min(max(fit, 1), p_.problem.h_kv) * (p_.problem.group >> p_.pack_log2);
    } else {
      const int head_bytes = C::kHeadDimNope * 2 + C::kHeadDimV * 2;
      return max(min(kGroupBytes / head_bytes / max(keys, 1), p_.num_heads), 1);
    }
  }
  __device__ int tiles_of(int length) const {
    if constexpr (C::kGrouped) length <<= p_.pack_log2;
    return (length + kTileRows - 1) / kTileRows;
  }

  // The lane's sequence; returns the items of all 32.
  __device__ int load() {
    const int seq = first_seq_ + lane_;
    q_begin_ = q_length_ = k_begin_ = k_length_ = 0;
    if (seq < p_.num_seqs) {
      if constexpr (C::kGrouped) {
        q_begin_ = static_cast<int>(p_.problem.first_query(seq));
        q_length_ = max(static_cast<int>(p_.problem.queries(seq)), 0);
        k_length_ = max(static_cast<int>(p_.problem.keys(seq)), 0);
      } else {
        q_begin_ = p_.cu_seqlens_q[seq];
        q_length_ = max(p_.cu_seqlens_q[seq + 1] - q_begin_, 0);
        k_begin_ = p_.cu_seqlens_k[seq];
        k_length_ = max(p_.cu_seqlens_k[seq + 1] - k_begin_, 0);
      }
    }
    through_ = tiles_of(q_length_) * p_.num_heads;
    for (int i = 1; i < 32; i *= 2) {
      const int from = __shfl_up_sync(kAll, through_, static_cast<unsigned>(i));
      if (lane_ >= i) through_ += from;
    }
    return __shfl_sync(kAll, through_, 31);
  }

  const Params& p_;
  const int lane_;
  int first_seq_ = 0;
  int before_ = 0;  // items of all sequences before first_seq_
  int q_begin_, q_length_, k_begin_, k_length_;
  int through_;  // items from first_seq_ up to and with the lane's sequence
  int total_;    // of the 32 sequences; last, so that load() finds the others there
};

}  // namespace flash_mla::sm90::prefill
