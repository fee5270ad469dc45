#pragma once

// The four producer warps of sparse decode over 656-byte rows: each brings the rows of 16 of a tile's 64 keys into a
// slot of the ring, as they are; rows of keys that are none become zeros.
//
// kBulk: one bulk copy a row, by the copy engine. Otherwise copies of 16 bytes, which leave no register waiting either.

#include <cstdint>

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
  static constexpr int kRowBytes = fp8_decode::kRowStride, kRowUnits = kRowBytes / 16;
  static constexpr std::uint32_t kNone = 0xFFFFFFFFu;

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

  // Where a key's row lies, in units of 16 bytes from the cache's beginning.
  __device__ std::uint32_t row_of(const ListedKeys& k, int index) const {
    if (index < 0) return kNone;
    const auto n = static_cast<std::uint32_t>(index);
    const std::uint32_t page = k.page_magic == 0 ? n : __umulhi(n, k.page_magic) >> k.page_shift;
    return page * k.page_units + (n - page * k.page_size) * k.token_units;
  }

  // The rows of one slot.
  __device__ void bring_bulk(int slot, const std::byte* cache, std::uint32_t row) const {
    const std::uint32_t valid = __ballot_sync(0xFFFFFFFFu, row != kNone);
    const std::uint32_t to = ptx::smem_address(s.rows[slot]);
    for (std::uint32_t none = ~valid & ((1u << kKeys) - 1); none != 0; none &= none - 1) {
      const std::uint32_t at = to + (__ffs(static_cast<int>(none)) - 1) * kRowBytes;
      for (int i = lane; i < kRowUnits; i += 32)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at + i * 16), "r"(0) : "memory");
    }
    if (lane == 0) s.valid[slot] = valid;
    __syncwarp();
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(&s.rows_full[slot],
                                     static_cast<std::uint32_t>(__popc(valid) * kRowBytes));
    }
    __syncwarp();
    if (row != kNone) {
      ptx::bulk_load(to + lane * kRowBytes, cache + row * std::uint64_t{16}, kRowBytes, &s.rows_full[slot]);
    }
  }
  __device__ void bring_pieces(int slot, const std::byte* cache, std::uint32_t row) const {
    const std::uint32_t valid = __ballot_sync(0xFFFFFFFFu, row != kNone);
    if (lane == 0) s.valid[slot] = valid;
    std::uint32_t to = ptx::smem_address(s.rows[slot]) + lane * 16;
    int key = 0, unit = lane;  // of this lane's next piece
#pragma unroll 3
    for (int i = 0; i < (kKeys * kRowUnits + 31) / 32; ++i) {
      if (unit >= kRowUnits) {
        unit -= kRowUnits;
        ++key;
      }
      const std::uint32_t from = __shfl_sync(0xFFFFFFFFu, row, key % kKeys);
      if (key < kKeys) {
        ptx::copy_async_16_or_zeros(
            to, cache + (from == kNone ? 0 : from + static_cast<std::uint32_t>(unit)) * std::uint64_t{16},
            from != kNone);
      }
      to += 512;
      unit += 32;
    }
    ptx::copy_async_arrive(&s.rows_full[slot]);
  }

  __device__ void run() const {
    Cursor cursor{};
    begin_item(cursor, walk_of(p, part).first());
    if (cursor.req < 0) return;
    fp8_decode::RingPlace<kHeads> place(warp);
    int list, index = take(cursor, list);
    for (bool more = true; more;) {
      const ListedKeys& k = p.keys[list];
      const std::uint32_t row = row_of(k, index);
      const std::byte* cache = k.cache;
      more = cursor.req >= 0;
      if (more) index = take(cursor, list);
      ptx::mbarrier_wait(&s.rows_empty[place.slot], place.phase ^ 1);
      if constexpr (kBulk) {
        bring_bulk(place.slot, cache, row);
      } else {
        bring_pieces(place.slot, cache, row);
      }
      place.advance(fp8_decode::kGroups);
    }
  }
};

}  // namespace flash_mla::sm90::sparse
