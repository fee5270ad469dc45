#pragma once

// Dense MLA decode over FP8 caches, up to 64 query rows per CTA: the consumers of raw_rows (their tiles, shared-memory map
// and registers: sparse_decode/sm90/rows_kernel.cuh), the schedule of dense decode.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/work.cuh"
#include "kernels/attention/raw_rows/sm90/bring.cuh"
#include "kernels/attention/raw_rows/sm90/scores.cuh"
#include "kernels/attention/raw_rows/sm90/values.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::dense_fp8 {

/// A producer warp brings 16 of a tile's 64 keys: by one copy where they follow each other in a page, else a row to a lane.
template <class S>
struct RowsProducer {
  using F = typename S::Format;
  const DenseFp8Params& p;
  S& s;
  const PartRange& part;
  const int warp, lane;

  /// This lane's key of the warp's 16 in a tile, which has `count` of them.
  struct Keys {
    raw_rows::Key<F> own;
    int count;
  };

  // Keys are looked up a tile before they are needed.
  __device__ void run() const {
    raw_rows::RingPlace<S::kRing> place(warp);
    const auto walk = walk_of(p, part);
    Item item = walk.first();
    while (walk.holds(item) && item.begin_block >= item.end_block) item = walk.next(item);
    if (!walk.holds(item)) return;
    int tile = item.begin_block;
    Keys next = keys_of(item, tile);
    while (true) {
      const Keys keys = next;
      if (++tile == item.end_block) {
        do item = walk.next(item);
        while (walk.holds(item) && item.begin_block >= item.end_block);
        tile = item.begin_block;
      }
      const bool more = walk.holds(item);
      if (more) next = keys_of(item, tile);
      bring(place, keys);
      if (!more) return;
      place.advance(raw_rows::kGroups);
    }
  }

 private:
  __device__ Keys keys_of(const Item& item, int tile) const {
    const int first = tile * kTileTokens + warp * raw_rows::kGroupKeys;
    Keys keys{};
    keys.count = min(max(item.length - first, 0), raw_rows::kGroupKeys);
    if (lane < keys.count) {
      keys.own.row = row_of(item.req, first + lane);
    }
    return keys;
  }
  __device__ void bring(const raw_rows::RingPlace<S::kRing>& place, const Keys& keys) const {
    if (!p.whole_tiles || keys.count < raw_rows::kGroupKeys)
      return raw_rows::bring_rows(s, place, lane, keys.own);
    ptx::mbarrier_wait(&s.rows_empty[place.slot], place.phase ^ 1);
    if (lane == 0) {
      s.valid[place.slot] = 0xFFFF;
      ptx::mbarrier_arrive_expect_tx(&s.rows_full[place.slot], raw_rows::kGroupKeys * F::kBytes);
      ptx::bulk_load(s.rows[place.slot], keys.own.row, raw_rows::kGroupKeys * F::kBytes,
                     &s.rows_full[place.slot]);
    }
    __syncwarp();
  }
  __device__ const std::byte* row_of(int req, int token) const {
    const int index = token / p.page_size;
    const std::int64_t page = p.block_table[req * p.block_table_stride + index];
    return p.cache + page * p.page_stride + (token - index * p.page_size) * p.token_stride;
  }
};

template <class F, int kHeads, bool kBf16>
__global__ void __launch_bounds__(raw_rows::kThreads, 1)
    dense_fp8_decode_kernel(const __grid_constant__ QueryView q, const __grid_constant__ DenseFp8Params p) {
  extern __shared__ std::byte dynamic_smem[];
  using S = raw_rows::Smem<F, kHeads>;
  using Work = RowsWork<kBf16>;
  auto& s = *reinterpret_cast<S*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  using Registers = raw_rows::Registers<kHeads>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) raw_rows::init_barriers(s);
  ptx::grid_dependency_wait();
  const PartRange part = part_of(p, static_cast<int>(blockIdx.z));
  __syncthreads();
  ptx::grid_dependency_launch();
  if (part.begin_req >= p.batch) return;
  const Work work{p, part, q};
  if (warp < 4) {
    ptx::set_max_registers_up<Registers::kScores>();
    raw_rows::Scores<kHeads, F, Work>(work, s).run();
  } else if (warp < 8) {
    ptx::set_max_registers_up<Registers::kValues>();
    raw_rows::Values<kHeads, F, Work, 0>(work, s).run();
  } else if (warp < 12) {
    ptx::set_max_registers_up<Registers::kValues>();
    raw_rows::Values<kHeads, F, Work, 1>(work, s).run();
  } else {
    ptx::set_max_registers_down<Registers::kProducers>();
    RowsProducer<S>{p, s, part, warp - 12, static_cast<int>(threadIdx.x) % 32}.run();
  }
}

}  // namespace flash_mla::sm90::dense_fp8
