#pragma once

// What the roles of MLA decode over 656-byte rows share: the shared-memory map and the ring of rows.
//
// No key is ever widened into shared memory. Rows lie there as the cache has them; the two groups of consumers load
// from them what a product's A operand needs, as it lies in registers, and turn e4m3 into fp16 there:
//
//   S^T (keys x heads)    = K Q^T     A is K: a thread has two keys
//   O^T (columns x heads) = V^T P^T   A is V^T: a thread has four columns of a block of 128
//
// So keys and columns are M, and the heads N: 16, 32 or 64.

#include <cstddef>
#include <cstdint>

#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tile.cuh"
#include "kernels/ptx/words.cuh"
#include "kv/format.h"

namespace flash_mla::sm90::fp8_decode {

using Row = kv::Fp8V32;
inline constexpr int kTileKeys = 64;
inline constexpr int kGroupKeys = 16;                   ///< of a slot of the ring: what a warp scores
inline constexpr int kGroups = kTileKeys / kGroupKeys;  ///< of a tile
inline constexpr int kBlocks = Row::kScales;            ///< of 128 columns with a scale of their own
inline constexpr int kRowStride = Row::kTokenBytes;     ///< 164 words: 4 more than a multiple of the 32 banks
inline constexpr int kThreads = 512;                    ///< scores, values (two), producers
inline constexpr int kWarpsOfGroup = 4;
inline constexpr int kValueWarps = 8;
inline constexpr float kMaxGrowth = 8.0f;  ///< base 2: scores may pass their reference by so much
/// P is stored times scale * 2^(kWeightShift - exponent), scales being at most 2^exponent: at most 2^15.
inline constexpr int kWeightShift = 7;

template <int kHeads>
inline constexpr int kSlots = kHeads == 64   ? 11
                              : kHeads == 32 ? 15
                                             : 18;
template <int kHeads>
inline constexpr int kWeightBuffers = kHeads == 64 ? 1 : 2;

template <int kHeads>
struct alignas(1024) Smem {
  ptx::Tile<__half, kHeads, Row::kLatent> q;  ///< in the order of k that Scores says, times 2^q_exponent
  ptx::Tile<__nv_bfloat16, kHeads, kv::kRopeWidth> q_rope;
  ptx::Tile<__half, kHeads, kTileKeys> weights[kWeightBuffers<kHeads>][kBlocks];
  std::byte rows[kSlots<kHeads>][kGroupKeys * kRowStride];
  float reference[kHeads];                        ///< of the softmax, base 2; -inf until a key has been seen
  float rescale[kWeightBuffers<kHeads>][kHeads];  ///< what O is multiplied with before a tile
  float exchange[kWarpsOfGroup][kHeads];          ///< between the warps that score
  float warp_scale[kWarpsOfGroup];
  float factor[kHeads];  ///< what O is multiplied with at the end of an item
  int rescaled[kWeightBuffers<kHeads>];
  std::uint32_t valid[kSlots<kHeads>];  ///< a bit for each key that is one
  std::uint64_t rows_full[kSlots<kHeads>], rows_empty[kSlots<kHeads>];
  std::uint64_t weights_full[kWeightBuffers<kHeads>], weights_empty[kWeightBuffers<kHeads>];
  std::uint64_t end_full, end_empty;  ///< of an item: `factor`
};

static_assert(sizeof(Smem<64>) <= 226 * 1024 && sizeof(Smem<32>) <= 226 * 1024 &&
              sizeof(Smem<16>) <= 226 * 1024);

enum NamedBarrier : int { kScoresReady = 1 };
inline constexpr int kGroupThreads = 128;

/// A place in the ring of rows and the parity of its barriers' phase.
template <int kHeads>
struct RingPlace {
  int slot;
  std::uint32_t phase = 0;
  __device__ explicit RingPlace(int first) : slot(first) {}
  __device__ void advance(int slots) {
    slot += slots;
    if (slot >= kSlots<kHeads>) {
      slot -= kSlots<kHeads>;
      phase ^= 1;
    }
  }
};

template <int kHeads>
__device__ void init_barriers(Smem<kHeads>& s, int row_arrivals) {
  for (int i = 0; i < kSlots<kHeads>; ++i) {
    ptx::mbarrier_init(&s.rows_full[i], row_arrivals);
    ptx::mbarrier_init(&s.rows_empty[i], 1 + kValueWarps);
  }
  for (int i = 0; i < kWeightBuffers<kHeads>; ++i) {
    ptx::mbarrier_init(&s.weights_full[i], kWarpsOfGroup);
    ptx::mbarrier_init(&s.weights_empty[i], kValueWarps);
  }
  ptx::mbarrier_init(&s.end_full, kWarpsOfGroup);
  ptx::mbarrier_init(&s.end_empty, kValueWarps);
  ptx::fence_barrier_init();
}

/// Two e4m3 as two fp16, exactly: the low or the high half of x.
__device__ __forceinline__ std::uint32_t widen_low(std::uint32_t x) {
  return ptx::widen_e4m3(static_cast<std::uint16_t>(x));
}
__device__ __forceinline__ std::uint32_t widen_high(std::uint32_t x) {
  return ptx::widen_e4m3(static_cast<std::uint16_t>(x >> 16));
}

}  // namespace flash_mla::sm90::fp8_decode
