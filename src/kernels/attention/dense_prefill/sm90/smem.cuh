#pragma once

// What the roles of the prefill kernel share: the shared-memory map (its sizes: kernel.cuh), its barriers and
// the rings of slots.

#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/params.h"
#include "kernels/attention/dense_prefill/sm90/work.cuh"
#include "kernels/ptx/tile.cuh"

namespace flash_mla::sm90::prefill {

inline constexpr int kNopeChunks = kHeadDimNope / 64;
inline constexpr int kStages = 2;
inline constexpr int kConsumerThreads = 256;
inline constexpr int kConsumerWarps = kConsumerThreads / 32;
inline constexpr int kThreads = kConsumerThreads + 128;
static_assert(kTileRows == kTileKeys);

template <class T>
struct alignas(1024) Smem {
  ptx::Tile<T, kTileRows, kHeadDim> q;
  ptx::Tile<T, kTileKeys, kHeadDim> k[kStages];
  ptx::Tile<T, kTileKeys, kHeadDimV> v[kStages];
  Item items[2];
  std::uint64_t item_full[2], item_empty[2];
  std::uint64_t q_full, q_empty;
  std::uint64_t k_full[kStages], k_empty[kStages];
  std::uint64_t v_full[kStages], v_empty[kStages];
};

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
