#pragma once

// What the roles of the kernel share: the shared-memory map and the barriers.

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/sm90/work.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/layout.h"
#include "kernels/attention/dense_fp8_decode/sm90/params.h"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/tile.cuh"

namespace flash_mla::sm90::dense_fp8 {

inline constexpr int kConsumerThreads = 256;
inline constexpr int kConsumerWarps = kConsumerThreads / 32;
inline constexpr int kThreads = kConsumerThreads + 128;
inline constexpr float kMaxGrowth = 8.0f;  // base 2

/// What the softmax subtracts from a head's scores, and the score beyond which its reference moves.
struct Base {
  float subtract, limit;
};

template <int kHeads>
struct alignas(1024) Smem {
  ptx::Tile<__half, kHeads, kHeadDim>
      q;  // as query.cuh leaves it; of a bfloat16 rope part, so is its last chunk
  ptx::Tile<__half, kHeads, kTileTokens> weights[2];  // P, heads x keys, of the even and the odd tile
  alignas(128) std::byte raw[kStages][kTileTokens * kMaxPitch];
  alignas(16) Base base[kHeads];
  alignas(16) float q_scale[kHeads];  // 2^e by which q is too small, times what makes scores powers of two
  __half factor[2][kScaleTiles][kTileTokens];  // by slot, tile of columns and row: scale / 2^e
  float reference[kHeads];                     // of the softmax; -inf until a key has been seen
  float alpha[2][kHeads];                      // by slot: what a move of the reference multiplies O with
  float warp_max[4][kHeads];
  float warp_sum[kConsumerWarps][kHeads];
  float out_factor[kHeads];
  std::uint16_t* out_row[kHeads];  // null: padding
  int limit[kHeads];               // first key that the head's row does not see
  int moved[2];                    // by slot: the reference has
  std::uint64_t q_full, q_empty;
  std::uint64_t kv_full[kStages], kv_empty[kStages];
};

/// kWg0 and kWg1: of one warpgroup's threads. The others are of both.
enum NamedBarrier : int { kOrder = 1, kP0Ready, kP1Ready, kP0Free, kWg0, kWg1, kItem };

/// The power of two e with 2^e <= |x| < 2^(e + 1), for numbers that are none (0, subnormal, infinite) the format's
/// first or last.
__device__ __forceinline__ int exponent_of(float x) {
  return static_cast<int>(__float_as_uint(x) << 1 >> 24) - 127;
}
/// 2^e for -126 <= e <= 127.
__device__ __forceinline__ float power_of_two(int e) {
  return __uint_as_float(static_cast<std::uint32_t>(e + 127) << 23);
}

}  // namespace flash_mla::sm90::dense_fp8
