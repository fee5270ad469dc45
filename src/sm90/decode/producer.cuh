#pragma once

// The producer: one thread that keeps the two key slots and the query buffer filled, running ahead of the
// consumers across tiles and requests as far as the slots allow.
//
// Between a slot's release and the load into it stand one wait and as few instructions as possible: the page
// is looked up before the wait, and one copy brings four chunks (of a cluster, each CTA brings two to both).
// Pages of fewer than 64 tokens are copied chunk by chunk instead.

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
  int rank;

  static constexpr std::uint16_t kEveryCta = (1 << kCluster) - 1;

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

  // Half 0 or 1 of a tile that lies in one page.
  __device__ void load_half(int slot, int half, int page, int token, bool mine) const {
    constexpr int kBoxChunks = 4 / kCluster;
    std::uint64_t* full = &s.kv_full[slot][half];
    ptx::mbarrier_arrive_expect_tx(full, (half == 0 ? 4 : 5) * kChunkElements * 2);
    const int chunk = half * 4 + rank * kBoxChunks;
    load(s.kv[slot][chunk], k_map, full, token, chunk, page);
    if (half == 1 && mine) load(s.kv[slot][kRopeChunk], k_piece_map, full, token, kRopeChunk, page);
  }

  // The same of a tile made of several pages; the CTAs of a cluster share its tokens.
  __device__ void load_pieces(const Item& item, int tile, int slot, int half) const {
    const int begin = half * 4, end = half == 0 ? 4 : kChunks;
    const int count = min(item.length - tile * kTileTokens, kTileTokens);
    const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
    constexpr int kShare = kTileTokens / kCluster;
    const int box = p.page_size;
    std::uint64_t* full = &s.kv_full[slot][half];
    ptx::mbarrier_arrive_expect_tx(
        full, static_cast<std::uint32_t>((count + box - 1) / box * box * (end - begin)) * 128);
    for (int t = rank * kShare; t < min((rank + 1) * kShare, count); t += box) {
      const int page = pages[(tile * kTileTokens + t) / box];
      for (int c = begin; c < end; ++c) load(&s.kv[slot][c][t * 64], k_piece_map, full, 0, c, page);
    }
  }

  __device__ void run(const int4& part) const {
    int items = 0, uses[2] = {0, 0};
    const int tiles_per_page = p.page_size / kTileTokens;  // 0: several pages per tile
    const int m_block = blockIdx.x;
    const RowPlace first = place_of(p.blocks, m_block, 0);
    const int first_token = first.token, first_head = static_cast<int>(blockIdx.y) * p.group + first.head;
    for (Item item = first_item(p, part); item.req <= part.y; item = next_item(p, part, item)) {
      const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
      // The first page is looked up before the length is known to ask for it: both come from memory.
      const int at = tiles_per_page == 1 ? item.begin_tile : item.begin_tile / max(tiles_per_page, 1);
      int page = at < p.table_width ? pages[at] : 0, token = 0;
      if (item.begin_tile >= item.end_tile) continue;
      ptx::mbarrier_wait(&s.q_empty, (items & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(
          &s.q_full, static_cast<std::uint32_t>(p.blocks.tokens * p.blocks.heads) * 128 * kChunks);
      for (int c = 0; c < kChunks; c += p.q_box_chunks) {
        ptx::tma_load_5d(s.q[c], q_map, &s.q_full, 0, first_head, first_token, c, item.req);
      }
      ++items;
      for (int tile = item.begin_tile, slot = 0; tile < item.end_tile; ++tile, slot ^= 1) {
        if (tiles_per_page == 1) {
          if (tile > item.begin_tile) page = pages[tile];
        } else if (tiles_per_page > 1) {
          page = pages[tile / tiles_per_page];
          token = tile % tiles_per_page * kTileTokens;
        }
        const bool mine = kCluster == 1 || (tile & 1) == rank;
        const std::uint32_t free = (uses[slot]++ & 1) ^ 1;
        for (int half = 0; half < 2; ++half) {
          // Halves in the order in which they are freed.
          ptx::mbarrier_wait(&s.kv_empty[slot][half], free);
          if (tiles_per_page > 0) {
            load_half(slot, half, page, token, mine);
          } else {
            load_pieces(item, tile, slot, half);
          }
        }
      }
    }
  }
};

}  // namespace flash_mla::sm90
