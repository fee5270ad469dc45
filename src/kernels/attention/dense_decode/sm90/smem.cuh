#pragma once

// What the roles of the decode kernel share: the shared-memory map (its sizes: kernel.cuh) and its barriers.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/sm90/params.h"
#include "kernels/ptx/tile.cuh"

namespace flash_mla::sm90 {

inline constexpr int kChunks = kHeadDim / 64;  // of 64 columns
inline constexpr int kRopeChunk = kChunks - 1;
inline constexpr int kFirstQChunks = 3;  // what the first products wait for
inline constexpr int kChunkBytes = kTileTokens * 64 * 2;
inline constexpr int kConsumerThreads = 256;
inline constexpr int kThreads = kConsumerThreads + 128;
inline constexpr float kMaxGrowth = 8.0f;  // base 2

template <class T>
struct alignas(1024) DecodeSmem {
  ptx::Tile<T, kTileRows, kHeadDim, ptx::StepBits::k64> q;
  ptx::Tile<T, kTileTokens, kHeadDim, ptx::StepBits::k64> kv[2];
  float exchange[2][kTileRows];    // by warpgroup: the softmax reference it has moved to
  float row_sum[2][2][kTileRows];  // by parity of the item, so that one may be written while the last is read
  std::uint64_t q_full[2], q_empty;  // chunks of Q up to kFirstQChunks, and the rest
  std::uint64_t kv_full[2][3];       // by slot and part: chunks 0-3, 4-7, the rope chunk
  std::uint64_t kv_empty[2][2];  // by slot and half: chunks 0-3 are WG0's columns, 4-7 WG1's. The rope chunk
                                 // of a slot is freed by the warpgroup that reads P there, and loaded with
                                 // its half: 1 - slot.
  std::uint64_t first_issued;    // the first tile's two halves are under way
  std::uint64_t out_full[2];     // by warpgroup: its half of O lies in slot 1, ready to be copied out

  /// Half of V's columns, and of O's.
  __device__ auto& values(int slot, int half) {
    return kv[slot].template columns<kHeadDimV / 2>(half * kHeadDimV / 2);
  }
  /// P takes the place of the rope part.
  __device__ auto& weights(int slot) { return kv[slot].template columns<kTileTokens>(kHeadDimV); }
};

enum NamedBarrier : int { kP0Ready = 1, kP1Ready, kOrder, kItemEnd, kFillWg0, kFillWg1, kP1HalfReady };

}  // namespace flash_mla::sm90
