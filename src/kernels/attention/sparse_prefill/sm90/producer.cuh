#pragma once

// The producer warps: gather the keys of a list into the key slots, each 16 of a tile's 64, in the order in which the
// consumers need them. They run ahead across tiles and items as far as the slots allow, and wait for nothing but free
// slots: rows come by asynchronous copies that count in at a part's barrier when they have come.
//
// Nothing here fences (fence.proxy.async waits for what is on its way): the consumers do when they have waited. A key that
// is none is zeros in its slot.

#include <cuda.h>

#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/gather.cuh"
#include "kernels/attention/sparse_prefill/sm90/selection.cuh"
#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::sparse_prefill {

__device__ __forceinline__ void store_1(std::uint32_t to, std::uint32_t x) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

template <bool kBf16, int kHeadDim>
class Producer {
  using T = ptx::Element<kBf16>;
  using Rule = Gather;

 public:
  __device__ Producer(const SparsePrefillParams& params, Smem<T>& smem, const CUtensorMap* q_map,
                      const CUtensorMap* out_map, unsigned warp, unsigned lane)
      : p_(params), s_(smem), q_map_(q_map), out_map_(out_map), warp_(warp), lane_(lane) {}

  __device__ void run() {
    // Known to the compiler, it would be read from a special register again and again.
    asm volatile("" : "+r"(lane_), "+r"(warp_));
    Cursor cursor(p_, warp_, lane_);
    Rule gather{p_, lane_};
    std::uint32_t free = 3, item_parity = 0, staged_parity = 0;  // free: parities to wait for, by slot
    int staged = -1;                                             // the item whose O lies in slot 1, or will
    while (cursor.holds()) {
      Rows rows;
      cursor.locate(rows);
      const int index = cursor.index(), tile = cursor.tile();
      const bool is_last = cursor.is_last();
      cursor.advance();
      gather.begin(rows);
      if (warp_ == 0 && tile == 0) load_q(index, item_parity);
      if (tile == 0) item_parity ^= 1;
      const int slot = tile & 1;
      // Not before, so that the next item's first tile comes while this one's last is worked on.
      if (slot == 1 && staged >= 0) {
        store_out(staged, staged_parity);
        staged_parity ^= 1;
        staged = -1;
      }
      fill(gather, rows, slot, free >> slot & 1);
      free ^= 1U << slot;
      if (is_last && is_staged(tile + 1)) staged = index;
    }
    if (staged >= 0) store_out(staged, staged_parity);
  }

 private:
  __device__ void load_q(int index, std::uint32_t parity) const {
    const Item item = item_at(p_, index);
    ptx::mbarrier_wait(&s_.q_empty, parity ^ 1);
    if (!ptx::elect_one()) return;
    ptx::mbarrier_arrive_expect_tx(&s_.q_full, kHeadDim * kTileRows * 2);
    ptx::tma_load_5d(&s_.q, q_map_, &s_.q_full, 0, item.head_block * kTileRows, item.token, 0, 0);
  }

  // This warp's keys of a tile. `free` is the parity of what says that a part may be filled.
  __device__ void fill(Rule& gather, const Rows& rows, int slot, std::uint32_t free) const {
    const std::uint32_t first = ptx::smem_address(s_.kv[slot].at(0)) + warp_ * (kWarpKeys * 128);
    std::uint64_t(&full)[3] = s_.kv_full[slot];
    ptx::mbarrier_wait(&s_.kv_empty[slot][0], free);
    if (lane_ % 8 == 0) {
      store_1(ptx::smem_address(&s_.valid[slot][4 * warp_ + lane_ / 8]), rows.valid);
      ptx::mbarrier_arrive(&full[0]);
    }
    gather.template half<0>(rows, first);
    gather.template arrive<0>(&full[0]);
    if (kHeadDim > kHeadDimV && slot == 1) rope(gather, rows, first, &full[2]);
    gather.next(rows);
    ptx::mbarrier_wait(&s_.kv_empty[slot][1], free);
    gather.template half<1>(rows, first + 4 * kChunkBytes);
    gather.template arrive<1>(&full[1]);
    if (kHeadDim > kHeadDimV && slot == 0) rope(gather, rows, first, &full[2]);
  }
  __device__ static void rope(Rule& gather, const Rows& rows, std::uint32_t first, std::uint64_t* full) {
    gather.rope(rows, first + kRopeChunk * kChunkBytes);
    gather.template arrive<2>(full);
  }

  // Copies a half's columns of O out of slot 1, then releases them for the warpgroup that put them there.
  __device__ void store_out(int index, std::uint32_t parity) const {
    if (warp_ < 2) return;
    const int half = static_cast<int>(warp_) - 2;
    const Item item = item_at(p_, index);
    ptx::mbarrier_wait(&s_.out_full[half], parity);
    if (!ptx::elect_one()) return;
    ptx::tma_store_5d(out_map_, s_.kv[1].at(half * 4), 0, item.head_block * kTileRows, item.token, half * 4,
                      0);
    ptx::tma_store_wait_read();
    ptx::mbarrier_arrive(&s_.kv_empty[1][half], 4);
  }

  const SparsePrefillParams& p_;
  Smem<T>& s_;
  const CUtensorMap *q_map_, *out_map_;
  unsigned warp_, lane_;
};

}  // namespace flash_mla::sm90::sparse_prefill
