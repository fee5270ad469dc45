#pragma once

// The producers: a warp that keeps the stages full of the cache's bytes, a row to a lane and bulk copy or a tile to one,
// and a thread that brings Q. Nothing but the stages says how far ahead of the consumers they run.

#include <cuda.h>

#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <KvFormat kFormat, int kHeads>
struct Producer {
  using Row = RowOf<kFormat>;
  static constexpr int kLaneRows = kTileTokens / 32;

  const DenseFp8Params& p;
  Smem<kHeads>& s;

  /// By a whole warp.
  __device__ void bring_keys(const PartRange& part, int lane) const {
    std::uint32_t free = 1;  // parity to wait for
    int stage = 0;
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item); item = walk.next(item)) {
      for (int tile = item.begin_block; tile < item.end_block; ++tile) {
        const int count = min(item.length - tile * kTileTokens, kTileTokens);
        const std::byte* from[kLaneRows];  // looked up before the wait
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) from[i] = row_of(item.req, tile, lane + 32 * i, count);
        ptx::mbarrier_wait(&s.kv_empty[stage], free);
        if (lane == 0) {
          ptx::mbarrier_arrive_expect_tx(&s.kv_full[stage], static_cast<std::uint32_t>(count * Row::kBytes));
        }
        __syncwarp();
        if (p.whole_tiles) {
          if (lane == 0) {
            ptx::bulk_load(s.raw[stage], from[0], static_cast<std::uint32_t>(count * Row::kBytes),
                           &s.kv_full[stage]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kLaneRows; ++i) {
            const int row = lane + 32 * i;
            if (row < count)
              ptx::bulk_load(&s.raw[stage][row * Row::kPitch], from[i], Row::kBytes, &s.kv_full[stage]);
          }
        }
        if (++stage == kStages) {
          stage = 0;
          free ^= 1;
        }
      }
    }
  }

  /// By one thread.
  __device__ void bring_q(const PartRange& part, const CUtensorMap* q_map) const {
    const RowPlace first = place_of(p.blocks, static_cast<int>(blockIdx.x), 0);
    std::uint32_t free = 1;
    const auto walk = walk_of(p, part);
    for (Item item = walk.first(); walk.holds(item); item = walk.next(item)) {
      if (item.begin_block >= item.end_block) continue;
      ptx::mbarrier_wait(&s.q_empty, free);
      free ^= 1;
      ptx::mbarrier_arrive_expect_tx(
          &s.q_full, static_cast<std::uint32_t>(p.blocks.tokens * p.blocks.heads * kChunks) * 128);
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c)
        ptx::tma_load_5d(s.q.at(c), q_map, &s.q_full, 0, first.head, first.token, c, item.req);
    }
  }

 private:
  // Where row `row` of a tile lies; of rows beyond the request's nothing is looked up.
  __device__ const std::byte* row_of(int req, int tile, int row, int count) const {
    if (row >= count) return nullptr;
    const int token = tile * kTileTokens + row, index = token / p.page_size;
    const std::int64_t page = p.block_table[req * p.block_table_stride + index];
    return p.cache + page * p.page_stride + (token - index * p.page_size) * p.token_stride;
  }
};

}  // namespace flash_mla::sm90::dense_fp8
