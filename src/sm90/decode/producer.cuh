#pragma once

// The producer: one thread that keeps the two key slots and the query buffer filled, running ahead of the
// consumers across tiles and requests as far as the slots allow.

#include <cstdint>

#include "sm90/decode/smem.cuh"
#include "sm90/ptx/tma.cuh"

namespace flash_mla::sm90 {

template <int kCluster>
struct Producer {
  const DecodeParams& p;
  DecodeSmem& s;
  const CUtensorMap* q_map;
  const CUtensorMap* k_map;
  int rank;

  // Tokens of a tile that one box holds; boxes of the whole tile that hold any of `count` tokens.
  __device__ int box_tokens() const { return min(p.page_size, kTileTokens / kCluster); }

  __device__ void load_chunks(const Item& item, int tile, int slot, int begin, int end) const {
    const int box = box_tokens();
    const int count = min(item.length - tile * kTileTokens, kTileTokens);
    const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
    const int per_cta = kTileTokens / kCluster;
    const std::uint32_t bytes = static_cast<std::uint32_t>((count + box - 1) / box * box) * 128;
    for (int c = begin; c < end; ++c) ptx::mbarrier_arrive_expect_tx(&s.kv_full[slot][c], bytes);
    for (int t = rank * per_cta; t < min((rank + 1) * per_cta, count); t += box) {
      const int token = tile * kTileTokens + t;
      const int page = pages[token / p.page_size], offset = token % p.page_size;
      for (int c = begin; c < end; ++c) {
        std::uint16_t* to = &s.kv[slot][c][t * 64];
        if constexpr (kCluster == 1) {
          ptx::tma_load_4d(to, k_map, &s.kv_full[slot][c], c * 64, blockIdx.y, offset, page);
        } else {
          ptx::tma_load_4d_multicast(to, k_map, &s.kv_full[slot][c], (1 << kCluster) - 1, c * 64, blockIdx.y,
                                     offset, page);
        }
      }
    }
  }

  __device__ void run(const int4& part) const {
    int items = 0, uses[2] = {0, 0};
    const int m_block = blockIdx.x;
    const int first_token = m_block / p.blocks.head_chunks * p.blocks.tokens;
    const int first_head =
        static_cast<int>(blockIdx.y) * p.group + m_block % p.blocks.head_chunks * kTileRows;
    for (Item item = first_item(p, part); item.req <= part.y; item = next_item(p, part, item)) {
      if (item.begin_tile >= item.end_tile) continue;
      ptx::mbarrier_wait(&s.q_empty, (items & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(
          &s.q_full, static_cast<std::uint32_t>(p.blocks.tokens * p.blocks.heads) * 128 * kChunks);
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load_4d(s.q[c], q_map, &s.q_full, c * 64, first_head, first_token, item.req);
      }
      ++items;
      for (int tile = item.begin_tile, slot = 0; tile < item.end_tile; ++tile, slot ^= 1) {
        const std::uint32_t free = (uses[slot]++ & 1) ^ 1;
        // Halves in the order in which they are freed.
        ptx::mbarrier_wait(&s.kv_empty[slot][0], free);
        load_chunks(item, tile, slot, 0, 4);
        ptx::mbarrier_wait(&s.kv_empty[slot][1], free);
        load_chunks(item, tile, slot, 4, kChunks);
      }
    }
  }
};

}  // namespace flash_mla::sm90
