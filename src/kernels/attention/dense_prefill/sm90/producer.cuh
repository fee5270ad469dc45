#pragma once

// The producer warp: takes items, tells the consumers, and loads what they need in the order in which they
// need it: Q, K0, K1, V0, K2, V1, ... It runs ahead into the next item as far as there is room.

#include <cuda.h>

#include <climits>
#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/smem.cuh"
#include "kernels/attention/dense_prefill/sm90/work.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::prefill {

/// Tiles of an item that are still to be loaded when the next item is taken.
inline constexpr int kTakeAhead = 2;

struct Maps {
  const CUtensorMap *q, *k_nope, *k_rope, *v;
};

/// Of MLA's heads.
template <class T>
class Producer {
  using C = LatentHeads;
  static constexpr int kStages = C::kStages, kTileKeys = C::kTileKeys;
  using Item = prefill::Item<false>;

 public:
  __device__ Producer(const Params& params, Smem<C, T>& smem, const Maps& maps)
      : p_(params), s_(smem), maps_(maps), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ void run() {
    WorkList<C> list(p_);
    int index = static_cast<int>(blockIdx.x);
    for (;;) {
      const Item item = list.at(index);
      if (lane_ == 0) {
        publish(item);
        if (item.num_tiles > 0) {
          load(item);
        } else if (item.head >= 0) {
          take();
        }
      }
      if (item.head < 0) break;
      index = __shfl_sync(0xFFFFFFFFu, next_, 0);
    }
  }

 private:
  // Asks for the next item's index; the answer is looked at when all of this item's loads have been issued.
  __device__ void take() {
    if (p_.taken != nullptr) next_ = static_cast<int>(gridDim.x) + atomicAdd(p_.taken, 1);
  }

  __device__ void publish(const Item& item) {
    ptx::mbarrier_wait(&s_.item_empty[items_.slot], items_.parity ^ 1);
    s_.items[items_.slot] = item;
    ptx::mbarrier_arrive(&s_.item_full[items_.slot]);
    items_.advance();
  }

  __device__ void load(const Item& item) {
    // Q comes from memory, and its place is free only when the item before is nearly done.
    ptx::tma_prefetch_4d(maps_.q, 0, item.query, 0, item.head);
    ptx::mbarrier_wait(&s_.q_empty, q_parity_ ^ 1);
    q_parity_ ^= 1;
    ptx::mbarrier_arrive_expect_tx(&s_.q_full, sizeof(s_.q));
    ptx::tma_load_4d(&s_.q, maps_.q, &s_.q_full, 0, item.query, 0, item.head);
    // From the last tile to the first: the one that needs a mask comes first.
    for (int i = 0; i <= item.num_tiles; ++i) {
      // Not before: the next item is to go to a CTA that is about to be free.
      if (i == max(item.num_tiles - kTakeAhead, 0)) take();
      if (i < item.num_tiles) load_k(item, item.key + (item.num_tiles - 1 - i) * kTileKeys);
      if (i > 0) load_v(item, item.key + (item.num_tiles - i) * kTileKeys);
    }
  }

  __device__ void load_k(const Item& item, int key) {
    std::uint64_t* full = &s_.k_full[k_.slot];
    ptx::mbarrier_wait(&s_.k_empty[k_.slot], k_.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, sizeof(s_.k[0]));
    ptx::tma_load_4d(&s_.k[k_.slot], maps_.k_nope, full, 0, key, 0, item.head);
    ptx::tma_load_4d(s_.k[k_.slot].at(C::kHeadDimNope / 64), maps_.k_rope, full, 0, key, 0, 0);
    k_.advance();
  }

  __device__ void load_v(const Item& item, int key) {
    std::uint64_t* full = &s_.v_full[v_.slot];
    ptx::mbarrier_wait(&s_.v_empty[v_.slot], v_.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, sizeof(s_.v[0]));
    ptx::tma_load_4d(&s_.v[v_.slot], maps_.v, full, 0, key, 0, item.head);
    v_.advance();
  }

  const Params& p_;
  Smem<C, T>& s_;
  const Maps maps_;
  const int lane_;
  Ring<2> items_;
  Ring<kStages> k_, v_;
  std::uint32_t q_parity_ = 0;
  int next_ = INT_MAX;
};

}  // namespace flash_mla::sm90::prefill
