#pragma once

// The four producer warps of sparse decode over 656-byte rows: each brings the rows of 16 of a tile's 64 keys.

#include <cstdint>

#include "kernels/attention/fp8_decode/sm90/bring.cuh"
#include "kernels/attention/fp8_decode/sm90/smem.cuh"
#include "kernels/attention/sparse_decode/sm90/smem.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::sparse {

template <int kHeads, bool kBulk>
struct RowsProducer {
  const SparseDecodeParams& p;
  fp8_decode::Smem<kHeads>& s;
  const PartRange& part;
  const int warp, lane;
  const int token;

  static constexpr int kKeys = fp8_decode::kGroupKeys;

  // The tiles that follow, of a list those in a row.
  struct Cursor {
    const std::int32_t* at;  // this lane's index in the next tile
    int left;                // entries of the list from there on
    int tiles;               // of the run
    int end_tile;            // of the item
    int req;                 // of the next tile; -1 behind the last
    int list;                // of the next tile
  };

  // The run of an item's tiles from `tile` on.
  __device__ void begin_run(Cursor& c, int req, int tile, int end_tile) const {
    const int base_tiles = tiles_of(list_length(p.keys[0], req));
    c.list = tile >= base_tiles;
    const ListedKeys& k = p.keys[c.list];
    const int in_list = c.list != 0 ? tile - base_tiles : tile;
    const int position = in_list * kTileTokens + warp * kKeys + lane;
    c.at = k.indices + req * k.indices_stride_b + token * k.indices_stride_s + position;
    c.left = lane < kKeys ? list_length(k, req) - position : 0;
    // The list, up to 64 lines of it, into L2: a tile's indices are waited for before its rows can be asked for.
    if (lane < kKeys && (warp * kKeys + lane) * 32 < k.topk - in_list * kTileTokens) {
      ptx::prefetch_l2(c.at - position + in_list * kTileTokens + (warp * kKeys + lane) * 32);
    }
    c.tiles = (c.list != 0 ? end_tile : min(end_tile, base_tiles)) - tile;
    c.end_tile = end_tile;
    c.req = req;
  }
  __device__ void begin_item(Cursor& c, Item item) const {
    const auto walk = walk_of(p, part);
    while (walk.holds(item) && item.begin_block >= item.end_block) item = walk.next(item);
    if (walk.holds(item)) {
      begin_run(c, item.req, item.begin_block, item.end_block);
    } else {
      c.req = -1;
    }
  }
  // This lane's index in the next tile, -1 if there is none, and the tile's list.
  __device__ int take(Cursor& c, int& list) const {
    int index = -1;
    list = c.list;
    if (c.left > 0) index = __ldg(c.at);
    c.at += kTileTokens;
    c.left -= kTileTokens;
    if (--c.tiles == 0) {
      const int base_tiles = tiles_of(list_length(p.keys[0], c.req));
      if (c.list == 0 && c.end_tile > base_tiles) {
        begin_run(c, c.req, base_tiles, c.end_tile);
      } else {
        const auto walk = walk_of(p, part);
        begin_item(c, walk.next({c.req, walk.tables.length(c.req), 0, c.end_tile, false, 0}));
      }
    }
    return index;
  }

  // Where a key's row lies; null if it is none.
  __device__ static const std::byte* row_of(const ListedKeys& k, int index) {
    if (index < 0) return nullptr;
    const auto n = static_cast<std::uint32_t>(index);
    const std::uint32_t page = k.page_magic == 0 ? n : __umulhi(n, k.page_magic) >> k.page_shift;
    const std::uint32_t units = page * k.page_units + (n - page * k.page_size) * k.token_units;
    return k.cache + units * std::uint64_t{16};
  }

  __device__ void run() const {
    Cursor cursor{};
    begin_item(cursor, walk_of(p, part).first());
    if (cursor.req < 0) return;
    fp8_decode::RingPlace<kHeads> place(warp);
    int list, index = take(cursor, list);
    for (bool more = true; more;) {
      const std::byte* row = row_of(p.keys[list], index);
      more = cursor.req >= 0;
      if (more) index = take(cursor, list);
      fp8_decode::bring_rows<kHeads, kBulk>(s, place, lane, row);
      place.advance(fp8_decode::kGroups);
    }
  }
};

}  // namespace flash_mla::sm90::sparse
