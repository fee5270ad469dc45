#pragma once

// What the roles of MLA decode over rows as they lie in a cache share: the shared-memory map and the ring of rows.
//
// No key is ever widened into shared memory. Rows lie there as the cache has them; the two groups of consumers load
// from them what a product's A operand needs, as it lies in registers, and turn e4m3 into fp16 there:
//
//   S^T (keys x heads)    = K Q^T     A is K: a thread has two keys
//   O^T (columns x heads) = V^T P^T   A is V^T: a thread has a few columns
//
// So keys and columns are M, and the heads N: 16, 32 or 64.

#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "kernels/attention/raw_rows/sm90/formats.h"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tile.cuh"
#include "kernels/ptx/words.cuh"

namespace flash_mla::sm90::raw_rows {

inline constexpr int kTileKeys = 64;
inline constexpr int kGroupKeys = 16;                   ///< of a slot of the ring: what a warp scores
inline constexpr int kGroups = kTileKeys / kGroupKeys;  ///< of a tile
inline constexpr int kThreads = 512;                    ///< scores, values (two), producers
inline constexpr int kWarpsOfGroup = 4;
inline constexpr int kValueWarps = 8;
inline constexpr float kNoReference = -FLT_MAX;
inline constexpr float kMaxGrowth = 8.0f;  ///< base 2: scores may pass their reference by so much
/// P is stored times scale * 2^(kWeightShift - exponent), scales being at most 2^exponent: at most 2^15. So the weights of
/// keys whose scales are 2^14 times smaller than the largest of the item lose bits, and of 2^31 times all.
inline constexpr int kWeightShift = 7;

/// Scales of a slot: of block b and key k against 2^-6 of the key's largest, fp16; that, of each key.
template <class Format>
struct ScaleTable {
  std::uint16_t of[Format::kScaleBlocks][kGroupKeys];
  float of_key[kGroupKeys];
};
template <class Format, bool = Format::kTable>
inline constexpr std::size_t kTableBytes = 0;
template <class Format>
inline constexpr std::size_t kTableBytes<Format, true> = sizeof(ScaleTable<Format>);

template <class Format, int kHeads>
inline constexpr int kWeightBuffers = Format::kWeights* kHeads > 128 ? 1 : 2;

template <class Format, int kHeads>
inline constexpr int kSlots = (226 * 1024 - 3072 - kHeads * 2 * Format::kHeadDim -
                               kWeightBuffers<Format, kHeads> * Format::kWeights * kHeads * 2 * kTileKeys) /
                              (kGroupKeys * Format::kStride + kTableBytes<Format>);

template <class F, int kHeads>
struct alignas(1024) Smem {
  using Format = F;
  static constexpr int kBuffers = kWeightBuffers<F, kHeads>;
  static constexpr int kRing = kSlots<F, kHeads>;
  /// Chunks in the order of k in which rows' words come (query.cuh). Those of e4m3 are times powers of two; the others
  /// are of Q's own type.
  ptx::Tile<__half, kHeads, F::kHeadDim> q;
  ptx::Tile<__half, kHeads, kTileKeys> weights[kBuffers][F::kWeights];
  std::byte rows[kRing][kGroupKeys * F::kStride];
  alignas(16) std::byte scale_tables[F::kTable ? kRing * kTableBytes<F> : 16];
  float q_factor[kHeads];                 ///< what a score's part from e4m3 is multiplied with
  float reference[kHeads];                ///< of the softmax, base 2; kNoReference until a key has been seen
  float rescale[kBuffers][kHeads];        ///< what O is multiplied with before a tile
  float exchange[kWarpsOfGroup][kHeads];  ///< between the warps that score
  float warp_scale[kWarpsOfGroup];
  float factor[kHeads];  ///< what O is multiplied with at the end of an item
  int rescaled[kBuffers];
  std::uint32_t valid[kRing];  ///< a bit for each key that is one
  std::uint64_t rows_full[kRing], rows_empty[kRing];
  std::uint64_t weights_full[kBuffers], weights_empty[kBuffers];
  std::uint64_t end_full, end_empty;  ///< of an item: `factor`

  __device__ ScaleTable<F>& scales(int slot) { return reinterpret_cast<ScaleTable<F>*>(scale_tables)[slot]; }
  __device__ const ScaleTable<F>& scales(int slot) const {
    return reinterpret_cast<const ScaleTable<F>*>(scale_tables)[slot];
  }
  /// Q's chunks of its own type.
  template <class T>
  __device__ auto& own_q() {
    return reinterpret_cast<ptx::Tile<T, kHeads, F::kHeadDim - 64 * F::kE4m3Chunks>&>(*q.at(F::kE4m3Chunks));
  }
};

static_assert(sizeof(Smem<V32Rows, 64>) <= 226 * 1024 && sizeof(Smem<V32Rows, 32>) <= 226 * 1024 &&
              sizeof(Smem<V32Rows, 16>) <= 226 * 1024 && sizeof(Smem<V4Rows, 64>) <= 226 * 1024 &&
              sizeof(Smem<WideRows<576>, 64>) <= 226 * 1024 && sizeof(Smem<WideRows<512>, 16>) <= 226 * 1024);

/// Registers of a thread, by its role; 128 at the start. With 64 heads O takes 128 of a values' thread.
template <int kHeads>
struct Registers {
  static constexpr int kScores = kHeads < 64 ? 200 : 144;
  static constexpr int kValues = kHeads < 64 ? 136 : 168;
  static constexpr int kProducers = kHeads < 64 ? 40 : 32;
  static_assert(kScores + 2 * kValues + kProducers == 512);
};

enum NamedBarrier : int { kScoresReady = 1 };
inline constexpr int kGroupThreads = 128;

/// A place in the ring of rows and the parity of its barriers' phase.
template <int kRing>
struct RingPlace {
  int slot;
  std::uint32_t phase = 0;
  __device__ explicit RingPlace(int first) : slot(first) {}
  __device__ void advance(int slots) {
    slot += slots;
    if (slot >= kRing) {
      slot -= kRing;
      phase ^= 1;
    }
  }
};

template <class S>
__device__ void init_barriers(S& s) {
  for (int i = 0; i < S::kRing; ++i) {
    ptx::mbarrier_init(&s.rows_full[i], 1);
    ptx::mbarrier_init(&s.rows_empty[i], 1 + kValueWarps);
  }
  for (int i = 0; i < S::kBuffers; ++i) {
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

/// The halves of x times those of y.
__device__ __forceinline__ std::uint32_t times(std::uint32_t x, std::uint32_t y) {
  const __half2 z = __hmul2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
  return reinterpret_cast<const std::uint32_t&>(z);
}

}  // namespace flash_mla::sm90::raw_rows
