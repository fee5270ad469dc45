#pragma once

// What the roles of the prefill kernel share: the shared-memory map (its sizes: kernel.cuh), its barriers and
// the rings of slots.

#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/params.h"
#include "kernels/attention/dense_prefill/sm90/work.cuh"
#include "kernels/ptx/tile.cuh"

namespace flash_mla::sm90::prefill {

inline constexpr int kConsumerThreads = 256;
inline constexpr int kConsumerWarps = kConsumerThreads / 32;
inline constexpr int kThreads = kConsumerThreads + 128;

/// C: LatentHeads or GroupedHeads.
template <class C, class T>
struct alignas(1024) Smem {
  static constexpr int kStages = C::kStages;
  ptx::Tile<T, kTileRows, C::kHeadDim> q;
  ptx::Tile<T, C::kTileKeys, C::kHeadDim> k[kStages];
  ptx::Tile<T, C::kTileKeys, C::kHeadDimV> v[kStages];
  Item<C::kGrouped> items[2];
  std::uint64_t item_full[2], item_empty[2];
  std::uint64_t q_full, q_empty;
  std::uint64_t k_full[kStages], k_empty[kStages];
  std::uint64_t v_full[kStages], v_empty[kStages];
};

/// By one thread, before the others look.
template <class C, class T>
__device__ __forceinline__ void init_barriers(Smem<C, T>& s) {
  ptx::mbarrier_init(&s.q_full, 1);
  ptx::mbarrier_init(&s.q_empty, kConsumerWarps);
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(&s.item_full[i], 1);
    ptx::mbarrier_init(&s.item_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < C::kStages; ++i) {
    ptx::mbarrier_init(&s.k_full[i], 1);
    ptx::mbarrier_init(&s.v_full[i], 1);
    ptx::mbarrier_init(&s.k_empty[i], kConsumerWarps);
    ptx::mbarrier_init(&s.v_empty[i], kConsumerWarps);
  }
  ptx::fence_barrier_init();
}

/// Position in a ring of kSlots slots and the parity of the phase it is in.
template <int kSlots>
struct Ring {
  int slot = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flash_mla::sm90::prefill
