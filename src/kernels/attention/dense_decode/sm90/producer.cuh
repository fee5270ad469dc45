#pragma once

// The producers: threads that keep the key slots and the query buffer filled, running ahead of the consumers
// across tiles and requests as far as the slots allow.
//
// Between a half slot's release and the load into it stand one wait and as few instructions as possible: the
// page is looked up before the wait, and one copy brings four chunks (of a cluster, each CTA brings two to
// both). Pages of fewer than 64 tokens are copied chunk by chunk instead.
//
// Compute-bound work (clusters) waits for every load, so there a thread for each half of each slot loads it
// as soon as it is free, whatever the others wait for; those of slot 1 also copy O out. Memory-bound work
// waits for the sum of the loads: one thread asks for keys in the order in which they are needed. Four are
// 1.3 us slower there, which the start loses. Another brings Q, up to nine copies that the first keys would
// wait for.

#include <cstdint>

#include "kernels/attention/dense_decode/sm90/smem.cuh"
#include "kernels/attention/dense_decode/sm90/work.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90 {

template <class T, int kCluster>
struct Producer {
  const DecodeParams& p;
  DecodeSmem<T>& s;
  const CUtensorMap* q_map;
  const CUtensorMap* q_rope_map;   // of the last chunk, where copies bring one each; may be q_map
  int q_rope_chunk;                // where it lies there
  const CUtensorMap* k_map;        // boxes of 64 tokens x kBoxChunks chunks
  const CUtensorMap* k_piece_map;  // boxes of min(page_size, 64) tokens x 1 chunk
  const CUtensorMap* out_map;
  int rank;
  unsigned thread;  // 0 to 3

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

  // The chunk of the rope part comes with the half whose warpgroup frees it.
  __device__ static bool brings_rope(int slot, int half) { return half == 1 - slot; }

  // Half of a tile that lies in one page.
  __device__ void load_half(int slot, int half, int tile, int page, int token) const {
    std::uint64_t* full = s.kv_full[slot];
    const int chunk = half * 4 + rank * kBoxChunks;
    ptx::mbarrier_arrive_expect_tx(&full[half], 4 * kChunkBytes);
    load(s.kv[slot].at(chunk), k_map, &full[half], token, chunk, page);
    if (!brings_rope(slot, half)) return;
    ptx::mbarrier_arrive_expect_tx(&full[2], kChunkBytes);
    if (kCluster == 1 || (tile & 1) == rank)
      load(&s.weights(slot), k_piece_map, &full[2], token, kRopeChunk, page);
  }

  // The same of a tile made of several pages; the CTAs of a cluster share its tokens. Not unrolled: it would
  // take registers from the loads of whole pages, and where producers spill they wait for memory (a lone
  // lane's store leaves a sector of local memory to be fetched before it can be read): 1 to 3% in clusters.
  __device__ void load_pieces(int slot, int half, const Item& item, int tile) const {
    const int count = min(item.length - tile * kTileTokens, kTileTokens), box = p.page_size;
    const auto bytes = static_cast<std::uint32_t>((count + box - 1) / box * box) * 128;
    const std::int32_t* pages = p.block_table + item.req * p.block_table_stride;
    constexpr int kShare = kTileTokens / kCluster;
    std::uint64_t* full = s.kv_full[slot];
    ptx::mbarrier_arrive_expect_tx(&full[half], 4 * bytes);
    if (brings_rope(slot, half)) ptx::mbarrier_arrive_expect_tx(&full[2], bytes);
#pragma unroll 1
    for (int t = rank * kShare; t < min((rank + 1) * kShare, count); t += box) {
      const int page = pages[(tile * kTileTokens + t) / box];
#pragma unroll 1
      for (int c = half * 4; c < half * 4 + 4; ++c)
        load(s.kv[slot].at(c, t), k_piece_map, &full[half], 0, c, page);
      if (brings_rope(slot, half))
        load(s.kv[slot].at(kRopeChunk, t), k_piece_map, &full[2], 0, kRopeChunk, page);
    }
  }

  // Copies a half's columns of O out of slot 1, then releases them for the warpgroup that put them there.
  __device__ void store_out(int half, int req, int token, int head, int stores) const {
    ptx::mbarrier_wait(&s.out_full[half], stores & 1);
    for (int c = half * 4; c < half * 4 + 4; c += p.out_box_chunks) {
      ptx::tma_store_5d(out_map, s.kv[1].at(c), 0, head, token, c, req);
    }
    ptx::tma_store_wait_read();
    for (int cta = 0; cta < kCluster; ++cta) ptx::mbarrier_arrive_cluster(&s.kv_empty[1][half], cta, 4);
  }

  // Chunks of Q on one of its barriers: 0 to kFirstQChunks - 1, or the rest.
  __device__ static int q_begin(int half) { return half == 0 ? 0 : kFirstQChunks; }
  __device__ static int q_end(int half) { return half == 0 ? kFirstQChunks : kChunks; }
  // Where chunk c of Q lies: the last one may have a tensor of its own.
  __device__ const CUtensorMap* q_map_of(int c) const { return c == kRopeChunk ? q_rope_map : q_map; }
  __device__ int q_chunk(int c) const { return c == kRopeChunk ? q_rope_chunk : c; }
  __device__ void load_q(int half, const Item& item, int first_token, int first_head) const {
    ptx::mbarrier_arrive_expect_tx(
        &s.q_full[half],
        static_cast<std::uint32_t>(p.blocks.tokens * p.blocks.heads * (q_end(half) - q_begin(half))) * 128);
    for (int c = q_begin(half); c < q_end(half); c += p.q_box_chunks) {
      ptx::tma_load_5d(s.q.at(c), q_map_of(c), &s.q_full[half], 0, first_head, first_token, q_chunk(c),
                       item.req);
    }
  }
  // The same into L2.
  __device__ void prefetch_q(int half, const Item& item, int first_token, int first_head) const {
    for (int c = q_begin(half); c < q_end(half); c += p.q_box_chunks) {
      ptx::tma_prefetch_5d(q_map_of(c), 0, first_head, first_token, q_chunk(c), item.req);
    }
  }

  // The page of a tile, 0 past the table's end.
  __device__ int page_of(const std::int32_t* pages, int tile, int tiles_per_page) const {
    const int at = tiles_per_page == 1 ? tile : tile / max(tiles_per_page, 1);
    return at < p.table_width ? pages[at] : 0;
  }

  // Brings half of a tile into L2. Where work is compute-bound, a slot's load starts when the slot is free
  // and is waited for: from L2 that takes half as long. Memory-bound work has nothing to gain and loses
  // bandwidth (measured: 1 to 4% faster with two row blocks or more, 4.2 to 3.7 TB/s in a plain stream).
  __device__ void prefetch_half(int half, int page) const {
    ptx::tma_prefetch_5d(k_map, 0, 0, half * 4 + rank * kBoxChunks, blockIdx.y, page);
  }

  // All of Q, for every item.
  __device__ void bring_q(const PartRange& part) const {
    const RowPlace first = place_of(p.blocks, static_cast<int>(blockIdx.x), 0);
    const int first_head = static_cast<int>(blockIdx.y) * p.group + first.head;
    std::uint32_t free = 1;
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) continue;
      ptx::mbarrier_wait(&s.q_empty, free);
      free ^= 1;
      for (int half = 0; half < 2; ++half) load_q(half, item, first.token, first_head);
    }
  }

  __device__ void run(const PartRange& part) const {
    constexpr bool kThreadPerHalf = kCluster > 1;
    constexpr int kTileStep = kThreadPerHalf ? 2 : 1;
    if (!kThreadPerHalf && thread > 0) {
      if (thread == 1U) bring_q(part);
      return;
    }
    const int my_slot = static_cast<int>(thread / 2),
              first_half = kThreadPerHalf ? static_cast<int>(thread % 2) : 0,
              last_half = kThreadPerHalf ? first_half : 1;
    int items = 0, uses = 0, stores = 0;                   // `uses`: of my slot, or of both
    const int tiles_per_page = p.page_size / kTileTokens;  // 0: several pages per tile
    const RowPlace first = place_of(p.blocks, static_cast<int>(blockIdx.x), 0);
    const int first_head = static_cast<int>(blockIdx.y) * p.group + first.head;
    const auto pages_of = [&](int req) { return p.block_table + req * p.block_table_stride; };
    // The first page is asked for ahead of the request's length: both come from memory.
    int tile = part.begin_block + my_slot, page = page_of(pages_of(part.begin_req), tile, tiles_per_page);
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item);) {
      const std::int32_t* pages = pages_of(item.req);
      if (item.begin_block < item.end_block) {
        if (kThreadPerHalf && my_slot == 0) {
          ptx::mbarrier_wait(&s.q_empty, (items & 1) ^ 1);
          load_q(first_half, item, first.token, first_head);
        }
        // At the start memory is what everything waits for: the first keys go ahead of the tile behind them.
        if (my_slot == 1 && items == 0) ptx::mbarrier_wait(&s.first_issued, 0);
        ++items;
        int slot = my_slot;
        for (; tile < item.end_block; tile += kTileStep) {
          const std::uint32_t free = kThreadPerHalf ? (uses++ & 1) ^ 1 : (uses >> slot & 1) ^ 1;
          const int token = tiles_per_page <= 1 ? 0 : tile % tiles_per_page * kTileTokens;
          for (int half = first_half; half <= last_half; ++half) {
            ptx::mbarrier_wait(&s.kv_empty[slot][half], free);
            if (tiles_per_page > 0) {
              load_half(slot, half, tile, page, token);
            } else {
              load_pieces(slot, half, item, tile);
            }
          }
          if constexpr (kThreadPerHalf) {
            if (my_slot == 0 && uses == 1) ptx::mbarrier_arrive(&s.first_issued);
          } else {
            uses ^= 1 << slot;
            slot ^= 1;
          }
          if (tile + kTileStep >= item.end_block) break;
          page = page_of(pages, tile + kTileStep, tiles_per_page);
          if (kThreadPerHalf && tiles_per_page == 1) {
            // At the start everything waits for the first tiles: the next ones ask for nothing until those
            // are there.
            if (uses == 1) ptx::mbarrier_wait(&s.kv_full[slot][first_half], 0);
            prefetch_half(first_half, page);
          }
        }
      }
      const bool staged = my_slot == 1 && is_staged<kCluster>(p, item);
      const int req = item.req;
      item = walk.next(item);
      if (walk.holds(item)) {
        tile = item.begin_block + my_slot;
        page = page_of(pages_of(item.req), tile, tiles_per_page);
      }
      if constexpr (kThreadPerHalf) {
        if (tiles_per_page == 1 && walk.holds(item) && tile < item.end_block) prefetch_half(first_half, page);
        if (my_slot == 0 && walk.holds(item) && item.req != req)
          prefetch_q(first_half, item, first.token, first_head);
        if (staged) store_out(first_half, req, first.token, first_head, stores++);
      }
    }
    // The CTA stays until the other's last arrival here is in (what it brings was waited for): one that finds the CTA gone
    // fails the launch. A cluster barrier that orders arrivals costs small batches 0.7 us; a relaxed one does not order them.
    if constexpr (kThreadPerHalf) ptx::mbarrier_wait(&s.kv_empty[my_slot][first_half], (uses & 1) ^ 1);
  }
};

}  // namespace flash_mla::sm90
