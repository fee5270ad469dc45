#pragma once

// The four producer warps of sparse decode over rows as they lie in the cache: each brings the rows of 16 of a tile's 64 keys.

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/bring.cuh"
#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/attention/sparse_decode/sm90/smem.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::sparse {

template <class S>
struct RowsProducer {
  using F = typename S::Format;
  const SparseDecodeParams& p;
  S& s;
  const PartRange& part;
  const int warp, lane;
  const int token;

  static constexpr int kKeys = raw_rows::kGroupKeys;

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

  // Where a key's row lies, null if it is none, and what its scales are.
  __device__ static raw_rows::Key<F> key_of(const ListedKeys& k, int index) {
    raw_rows::Key<F> key{};
    if (index < 0) return key;
    const auto n = static_cast<std::uint32_t>(index);
    const std::uint32_t page = k.page_magic == 0 ? n : __umulhi(n, k.page_magic) >> k.page_shift;
    const std::uint32_t offset = n - page * k.page_size;
    const std::uint32_t units = page * k.page_units + offset * k.token_units;
    key.row = k.cache + units * std::uint64_t{16};
    if constexpr (F::kTable) {
      const std::uint32_t at = page * k.page_units * 2 + k.page_size * (F::kBytes / F::kScaleBytes) + offset;
      key.scales = __ldg(reinterpret_cast<const uint2*>(k.cache) + at);
    }
    return key;
  }

  // An entry is asked for a tile before it is needed; where a key has scales, these are asked for a tile before, too.
  __device__ void run() const {
    Cursor cursor{};
    begin_item(cursor, walk_of(p, part).first());
    if (cursor.req < 0) return;
    raw_rows::RingPlace<S::kRing> place(warp);
    int list, index = take(cursor, list);
    raw_rows::Key<F> key = key_of(p.keys[list], index);
    bool more = cursor.req >= 0;
    if (more) index = take(cursor, list);
    while (true) {
      const bool last = !more;
      raw_rows::Key<F> next{};
      if (F::kTable && more) {
        next = key_of(p.keys[list], index);
        more = cursor.req >= 0;
        if (more) index = take(cursor, list);
      }
      raw_rows::bring_rows(s, place, lane, key);
      place.advance(raw_rows::kGroups);
      if (last) return;
      if (F::kTable) {
        key = next;
      } else {
        key = key_of(p.keys[list], index);
        more = cursor.req >= 0;
        if (more) index = take(cursor, list);
      }
    }
  }
};

}  // namespace flash_mla::sm90::sparse
