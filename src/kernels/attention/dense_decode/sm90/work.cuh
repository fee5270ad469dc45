#pragma once

// The work of a part as the roles of the decode kernel walk it.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/params.h"
#include "schedule/walk.h"

namespace flash_mla::sm90 {

using Item = PartItem<int>;

/// The requests and blocks of part `index`, whichever unit the schedule's rows are in.
__device__ __forceinline__ PartRange part_of(const DecodeParams& p, int index) {
  const int4 row = reinterpret_cast<const int4*>(p.parts)[2 * static_cast<std::int64_t>(index)];
  return part_range<int>(row.x, row.y, row.z, row.w, p.token_rows, kTileTokens);
}

/// What the walk reads, of the part that this CTA works on. Where partial results lie: see DecodeParams.
struct DecodeTables {
  const DecodeParams& p;

  __device__ static constexpr int block_size() { return kTileTokens; }
  __device__ int fixed_split_blocks() const { return p.split_tiles; }
  __device__ int length(int req) const { return p.cache_seqlens[req]; }
  __device__ int splits_before(int req) const { return p.num_splits[req]; }
  __device__ int begin_split() const { return p.parts[static_cast<std::int64_t>(blockIdx.z) * 8 + 4]; }
  __device__ int slot(int req, int before, int split, bool fixed) const {
    return fixed ? before + split : before - req + (split == 0 ? p.num_parts : split - 1);
  }
};

/// The walk over a part's items.
__device__ __forceinline__ PartWalk<int, DecodeTables> walk_of(const DecodeParams& p, const PartRange& part) {
  return {part, {p}};
}

/// Does the copy engine store the item's output, from the halves of slot 1? Those of the item's last tile
/// there are released when that has been read. With a single tile the slot is not the item's. Worth it where
/// work is compute-bound.
template <int kCluster>
__device__ __forceinline__ bool is_staged(const DecodeParams& p, const Item& item) {
  return kCluster > 1 && p.out_box_chunks > 0 && !item.is_split && item.end_block - item.begin_block > 1;
}

/// First key that row r of this CTA's block does not see.
__device__ __forceinline__ int limit_of(const DecodeParams& p, const Item& item, int r) {
  if (!p.causal) return item.length;
  return min(item.length - p.s_q + place_of(p.blocks, static_cast<int>(blockIdx.x), r).token + 1,
             item.length);
}

}  // namespace flash_mla::sm90
