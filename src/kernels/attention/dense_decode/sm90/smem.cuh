#pragma once

// What the roles of the decode kernel share: the shared-memory map and the work of a part.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/sm90/params.h"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90 {

inline constexpr int kChunks = kHeadDim / 64;  // of 64 columns
inline constexpr int kRopeChunk = kChunks - 1;
inline constexpr int kFirstQChunks = 3;  // what the first products wait for
inline constexpr int kChunkElements = 64 * 64;
inline constexpr int kConsumerThreads = 256;
inline constexpr int kThreads = kConsumerThreads + 128;
inline constexpr float kMaxGrowth = 8.0f;  // base 2

struct alignas(1024) DecodeSmem {
  std::uint16_t q[kChunks][kChunkElements];
  std::uint16_t kv[2][kChunks][kChunkElements];
  float exchange[2][kTileRows];    // by warpgroup: the softmax reference it has moved to
  float row_sum[2][2][kTileRows];  // by parity of the item, so that one may be written while the last is read
  std::uint64_t q_full[2], q_empty;  // chunks of Q up to kFirstQChunks, and the rest
  std::uint64_t kv_full[2][3];       // by slot and part: chunks 0-3, 4-7, the rope chunk
  std::uint64_t kv_empty[2][2];  // by slot and half: chunks 0-3 are WG0's columns, 4-7 WG1's. The rope chunk
                                 // of a slot is freed by the warpgroup that reads P there, and loaded with
                                 // its half: 1 - slot.
  std::uint64_t first_issued;    // the first tile's two halves are under way
  std::uint64_t out_full[2];     // by warpgroup: its half of O lies in slot 1, ready to be copied out
};

enum NamedBarrier : int { kP0Ready = 1, kP1Ready, kOrder, kItemEnd, kFillWg0, kFillWg1, kP1HalfReady };

/// The work of a part on one request.
struct Item {
  int req;
  int length;
  int begin_tile, end_tile;
  bool is_split;  // other parts work on this request too
  int slot;       // of the partial result
};

/// The requests and tiles of part `index`, whichever unit the schedule's rows are in.
__device__ __forceinline__ int4 part_of(const DecodeParams& p, int index) {
  const int4 row = reinterpret_cast<const int4*>(p.parts)[2 * static_cast<std::int64_t>(index)];
  if (!p.token_rows) return row;  // begin_req, end_req, begin_block, end_block
  return {row.x, row.z, row.y / kTileTokens, (row.w + kTileTokens - 1) / kTileTokens};
}

/// Where a part stops working on a request.
__device__ __forceinline__ int stop_tile(const int4& part, int req, int length) {
  const int tiles = (length + kTileTokens - 1) / kTileTokens;
  return req == part.y ? min(part.w, tiles) : tiles;
}

/// The work of a part on request `req` from `begin_tile` on.
__device__ __forceinline__ Item item_at(const DecodeParams& p, const int4& part, int req, int begin_tile) {
  Item item;
  item.req = req;
  if (req > part.y) return item;
  item.length = p.cache_seqlens[req];
  item.begin_tile = begin_tile;
  item.end_tile = stop_tile(part, req, item.length);
  const int before = p.num_splits[req];
  item.is_split = p.num_splits[req + 1] - before > 1;
  if (p.split_tiles > 0) {
    item.end_tile = min(item.end_tile, begin_tile + p.split_tiles);
    item.slot = before + begin_tile / p.split_tiles;
  } else {
    const int split =
        req != part.x || begin_tile == 0 ? 0 : p.parts[static_cast<std::int64_t>(blockIdx.z) * 8 + 4];
    item.slot = before - req + (split == 0 ? p.num_parts : split - 1);
  }
  return item;
}

/// The items of a part: first_item, then next_item while item.req <= part.y. One per request, or one per
/// split where split points are fixed.
__device__ __forceinline__ Item first_item(const DecodeParams& p, const int4& part) {
  return item_at(p, part, part.x, part.z);
}
__device__ __forceinline__ Item next_item(const DecodeParams& p, const int4& part, const Item& item) {
  const bool more = p.split_tiles > 0 && item.end_tile < stop_tile(part, item.req, item.length);
  return item_at(p, part, more ? item.req : item.req + 1, more ? item.end_tile : 0);
}

/// Does the copy engine store the item's output, from the halves of slot 1? Those of the item's last tile
/// there are released when that has been read. With a single tile the slot is not the item's. Worth it where
/// work is compute-bound.
template <int kCluster>
__device__ __forceinline__ bool is_staged(const DecodeParams& p, const Item& item) {
  return kCluster > 1 && p.out_box_chunks > 0 && !item.is_split && item.end_tile - item.begin_tile > 1;
}

}  // namespace flash_mla::sm90
