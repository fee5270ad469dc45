#pragma once

// The producers: four threads, one for each half of each key slot, that keep the slots and the query buffer
// filled, running ahead of the consumers across tiles and requests as far as the slots allow. The two of slot
// 0 bring Q as well.
//
// Between a half's release and the load into it stand one wait and as few instructions as possible: the page
// is looked up before the wait, one copy brings four chunks (of a cluster, each CTA brings two to both), and
// no half waits for another to be freed or issued. Pages of fewer than 64 tokens are copied chunk by chunk
// instead.

#include <cstdint>

#include "sm90/decode/smem.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

template <int kCluster>
struct Producer {
  const DecodeParams& p;
  DecodeSmem& s;
  const CUtensorMap* q_map;
  const CUtensorMap* k_map;        // boxes of 64 tokens x kBoxChunks chunks
  const CUtensorMap* k_piece_map;  // boxes of min(page_size, 64) tokens x 1 chunk
  const CUtensorMap* out_map;
  int rank;
  int slot, half;

  static constexpr std::uint16_t kEveryCta = (1 << kCluster) - 1;
  static constexpr int kBoxChunks = 4 / kCluster;

  // A box of either map. Of page_size < 64, `token` counts from the page's start; chunk c is `c * 64`
  // columns.
  __device__ static void load(void* to, const CUtensorMap* map, std::uint64_t* full, int token, int chunk,
                              int page) {
    if constexpr (kCluster == 1) {
      ptx::tma_load_5d(to, map, full, 0, token, chunk, blockIdx.y, page);
    } else {
      ptx::tma_load_5d_multicast(to, map, full, kEveryCta, 0, token, chunk, blockIdx.y, page);
    }
  }

  // The chunk of the rope part comes from the thread of the half whose warpgroup frees it.
  __device__ bool brings_rope() const { return half == 1 - slot; }

  // This half of a tile that lies in one page.
  __device__ void load_half(int tile, int page, int token) const {
    std::uint64_t* full = s.kv_full[slot];
    const int chunk = half * 4 + rank * kBoxChunks;
    ptx::mbarrier_arrive_expect_tx(&full[half], 4 * kChunkElements * 2);
    load(s.kv[slot][chunk], k_map, &full[half], token, chunk, page);
    if (!brings_rope()) return;
    ptx::mbarrier_arrive_expect_tx(&full[2], kChunkElements * 2);
    if (kCluster == 1 || (tile & 1) == rank)
      load(s.kv[slot][kRopeChunk], k_piece_map, &full[2], token, kRopeChunk, page);
  }

  // The same of a tile made of several pages; the CTAs of a cluster share its tokens.
  __device__ void load_pieces(const Item& item, int tile) const {
    const int count = min(item.length - tile * kTileTokens, kTileTokens), box = p.page_size;
    const auto bytes = static_cast<std::uint32_t>((count + box - 1) / box * box) * 128;
    const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
    constexpr int kShare = kTileTokens / kCluster;
    std::uint64_t* full = s.kv_full[slot];
    ptx::mbarrier_arrive_expect_tx(&full[half], 4 * bytes);
    if (brings_rope()) ptx::mbarrier_arrive_expect_tx(&full[2], bytes);
    for (int t = rank * kShare; t < min((rank + 1) * kShare, count); t += box) {
      const int page = pages[(tile * kTileTokens + t) / box];
      for (int c = half * 4; c < half * 4 + 4; ++c)
        load(&s.kv[slot][c][t * 64], k_piece_map, &full[half], 0, c, page);
      if (brings_rope()) load(&s.kv[slot][kRopeChunk][t * 64], k_piece_map, &full[2], 0, kRopeChunk, page);
    }
  }

  // Copies this half's columns of O out of slot 1, then releases them for the warpgroup that put them there.
  __device__ void store_out(const Item& item, int token, int head, int stores) const {
    ptx::mbarrier_wait(&s.out_full[half], stores & 1);
    for (int c = half * 4; c < half * 4 + 4; c += p.out_box_chunks) {
      ptx::tma_store_5d(out_map, s.kv[1][c], 0, head, token, c, item.req);
    }
    ptx::tma_store_wait_read();
    if constexpr (kCluster == 1) {
      ptx::mbarrier_arrive(&s.kv_empty[1][half], 4);
    } else {
      for (int cta = 0; cta < kCluster; ++cta) ptx::mbarrier_arrive_cluster(&s.kv_empty[1][half], cta, 4);
    }
  }

  // Chunks of Q on one of its barriers: 0 to kFirstQChunks - 1, or the rest.
  __device__ void load_q(const Item& item, int first_token, int first_head) const {
    const int begin = half == 0 ? 0 : kFirstQChunks, end = half == 0 ? kFirstQChunks : kChunks;
    ptx::mbarrier_arrive_expect_tx(
        &s.q_full[half], static_cast<std::uint32_t>(p.blocks.tokens * p.blocks.heads * (end - begin)) * 128);
    for (int c = begin; c < end; c += p.q_box_chunks) {
      ptx::tma_load_5d(s.q[c], q_map, &s.q_full[half], 0, first_head, first_token, c, item.req);
    }
  }

  // The page of a tile, 0 past the table's end.
  __device__ int page_of(const std::int32_t* pages, int tile, int tiles_per_page) const {
    const int at = tiles_per_page == 1 ? tile : tile / max(tiles_per_page, 1);
    return at < p.table_width ? pages[at] : 0;
  }

  // Brings this half of a tile into L2. Where work is compute-bound, a slot's load starts when the slot is
  // free and is waited for: from L2 that takes half as long. Memory-bound work has nothing to gain and loses
  // bandwidth (measured: 1 to 4% faster with two row blocks or more, 4.2 to 3.7 TB/s in a plain stream).
  __device__ void prefetch_half(int page, int tiles_per_page) const {
    if constexpr (kCluster > 1) {
      if (tiles_per_page == 1)
        ptx::tma_prefetch_5d(k_map, 0, 0, half * 4 + rank * kBoxChunks, blockIdx.y, page);
    }
  }

  __device__ void run(const int4& part) const {
    int items = 0, uses = 0, stores = 0;
    const int tiles_per_page = p.page_size / kTileTokens;  // 0: several pages per tile
    const RowPlace first = place_of(p.blocks, static_cast<int>(blockIdx.x), 0);
    const int first_head = static_cast<int>(blockIdx.y) * p.group + first.head;
    for (Item item = first_item(p, part), next; item.req <= part.y; item = next) {
      const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
      // The first page is looked up before the length is known to ask for it: both come from memory.
      int tile = item.begin_tile + slot, page = page_of(pages, tile, tiles_per_page);
      if (item.begin_tile < item.end_tile) {
        if (slot == 0) {
          ptx::mbarrier_wait(&s.q_empty, (items & 1) ^ 1);
          load_q(item, first.token, first_head);
        }
        // At the start memory is what everything waits for: the first keys go ahead of the tile behind them.
        if (slot == 1 && items == 0) ptx::mbarrier_wait(&s.first_issued, 0);
        ++items;
        for (; tile < item.end_tile; tile += 2) {
          ptx::mbarrier_wait(&s.kv_empty[slot][half], (uses++ & 1) ^ 1);
          if (tiles_per_page > 0) {
            load_half(tile, page, tiles_per_page == 1 ? 0 : tile % tiles_per_page * kTileTokens);
          } else {
            load_pieces(item, tile);
          }
          if (slot == 0 && uses == 1) ptx::mbarrier_arrive(&s.first_issued);
          if (tile + 2 >= item.end_tile) break;
          page = page_of(pages, tile + 2, tiles_per_page);
          prefetch_half(page, tiles_per_page);
        }
      }
      next = next_item(p, part, item);
      if (kCluster > 1 && next.req <= part.y && next.begin_tile + slot < next.end_tile) {
        prefetch_half(page_of(p.block_table + next.req * p.block_table_stride, next.begin_tile + slot, 1),
                      tiles_per_page);
      }
      if (slot == 1 && is_staged(p, item)) store_out(item, first.token, first_head, stores++);
    }
  }
};

}  // namespace flash_mla::sm90
