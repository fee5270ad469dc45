#pragma once

// What the roles of the sparse prefill kernel share: the shared-memory map (its sizes: kernel.cuh), its barriers, and
// the items.

#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/params.h"
#include "kernels/ptx/tile.cuh"

namespace flash_mla::sm90::sparse_prefill {

inline constexpr int kTileRows = 64;  ///< heads
inline constexpr int kTileKeys = 64;
inline constexpr int kMaxHeadDim = 576;
inline constexpr int kHeadDimV = 512;
inline constexpr int kConsumerThreads = 256;
inline constexpr int kProducerWarps = 4;
inline constexpr int kWarpKeys = kTileKeys / kProducerWarps;
inline constexpr int kThreads = kConsumerThreads + kProducerWarps * 32;
inline constexpr float kMaxGrowth = 8.0f;  // base 2
inline constexpr std::uint32_t kChunkBytes = kTileKeys * 128;
inline constexpr int kRopeChunk = kHeadDimV / 64;

template <class T>
struct alignas(1024) Smem {
  ptx::Tile<T, kTileRows, kMaxHeadDim, ptx::StepBits::k64> q;
  ptx::Tile<T, kTileKeys, kMaxHeadDim, ptx::StepBits::k64> kv[2];
  float exchange[2][kTileRows];        // by warpgroup: the softmax reference it has moved to
  float row_sum[2][2][kTileRows];      // by parity of the item and warpgroup
  float row_highest[2][2][kTileRows];  // the same: the highest score, base 2
  // By slot: bit i of byte 4 w + k for key 16 w + 4 i + k that is one.
  alignas(16) std::uint8_t valid[2][kTileKeys / 4];
  std::uint64_t q_full, q_empty;
  std::uint64_t kv_full[2][3];  // by slot and part: chunks 0-3, 4-7, the rope chunk
  std::uint64_t
      kv_empty[2][2];  // by slot and half: chunks 0-3 are WG0's columns, 4-7 WG1's. The rope chunk of a
                       // slot is freed by the warpgroup that reads P there, with its half: 1 - slot.
  std::uint64_t out_full[2];  // by warpgroup: its half of O lies in slot 1, ready to be copied out

  /// Half of V's columns, and of O's.
  __device__ auto& values(int slot, int half) {
    return kv[slot].template columns<kHeadDimV / 2>(half * kHeadDimV / 2);
  }
  /// P takes the last chunk, over the rope part where that is not part of V.
  __device__ auto& weights(int slot) { return kv[slot].template columns<kTileKeys>(kHeadDimV); }
};

enum NamedBarrier : int { kP0Ready = 1, kP1Ready, kOrder, kItemEnd, kP1HalfReady };

__device__ __forceinline__ std::uint32_t divide(std::uint32_t n, const Divisor& by) {
  return by.magic == 0 ? n : __umulhi(n, by.magic) >> by.shift;
}

/// A query token and a block of 64 of its heads.
struct Item {
  int token, head_block;
};
__device__ __forceinline__ Item item_at(const SparsePrefillParams& p, int index) {
  const int token = static_cast<int>(divide(static_cast<std::uint32_t>(index), p.by_head_blocks));
  return {token, index - token * p.head_blocks};
}
/// Entries of a token's list that are looked at.
__device__ __forceinline__ int list_length(const SparsePrefillParams& p, int token) {
  return p.topk_length == nullptr ? p.topk : max(min(__ldg(p.topk_length + token), p.topk), 0);
}
__device__ __forceinline__ int tiles_of(int entries) { return (entries + kTileKeys - 1) / kTileKeys; }

/// Are the item's rows put into slot 1 and copied out from there?
__device__ __forceinline__ bool is_staged(int tiles) { return tiles > 1; }

}  // namespace flash_mla::sm90::sparse_prefill
