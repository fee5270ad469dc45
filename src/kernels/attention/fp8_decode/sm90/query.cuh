#pragma once

// Q of an item into shared memory, in the order of k in which the warpgroup of scores takes a row's columns.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::fp8_decode {

/// Heads that share a power of two: what the threads' registers hold at a time.
template <int kHeads>
inline constexpr int kScaledHeads = kHeads < 32 ? kHeads : 32;

/// What products with Q's latent part are multiplied with, for each kScaledHeads heads.
template <int kHeads>
struct QueryFactors {
  float of[kHeads / kScaledHeads<kHeads>];
};

/// Where a thread of the warpgroup reads and writes: eight columns of a row in eight, of a block of 128; its four
/// pairs of columns go to byte 4 c of four 16-byte words. c is fastest, then the row in a swizzle's atom, so that a
/// warp's stores hit all banks.
struct QueryPlace {
  int c, row, half, odd;
  __device__ explicit QueryPlace(int thread)
      : c(thread % 4), row(thread / 4 % 8), half(thread / 32 % 2), odd(thread / 64) {}
  __device__ int column() const { return 32 * c + 16 * odd + 8 * half; }
  __device__ int rope_column() const { return 16 * c + 8 * half; }
  __device__ void store(std::uint32_t rows_of_eight, const std::uint32_t (&pair)[4]) const {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      ptx::store_shared_4(ptx::swizzled_word(rows_of_eight, row, 4 * half + p) + 4 * c, pair[p]);
    }
  }
};

template <bool kBf16>
__device__ __forceinline__ float2 floats(std::uint32_t x) {
  if constexpr (kBf16) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(x));
  }
}
__device__ __forceinline__ float finite_magnitude(float x) { return isfinite(x) ? fabsf(x) : 0.0f; }

/// The latent part as fp16, times powers of two that bring the largest finite element of kScaledHeads heads to 2^14;
/// the powers' inverses are returned. Rows that are no heads become zeros. For all threads of the warpgroup of scores,
/// which afterwards see it as an operand.
template <int kHeads, class Work, class Item>
__device__ QueryFactors<kHeads> load_query(const Work& work, Smem<kHeads>& s, const Item& item) {
  constexpr int kEights = kScaledHeads<kHeads> / 8, kLoads = kEights * kBlocks;
  using Chunk = ptx::Tile<__half, kHeads, 64>;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const QueryPlace place(thread);
  QueryFactors<kHeads> factors;
  const std::uint32_t q = ptx::smem_address(s.q.at(0)), q_rope = ptx::smem_address(s.q_rope.at(0));
#pragma unroll 1
  for (int first = 0; first < kHeads; first += kScaledHeads<kHeads>) {
    uint4 x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      x[i] = work.query(item, first + i / kBlocks * 8 + place.row, i % kBlocks * 128 + place.column());
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      for (const std::uint32_t two : {x[i].x, x[i].y, x[i].z, x[i].w}) {
        const float2 f = floats<Work::kBf16>(two);
        largest = fmaxf(largest, fmaxf(finite_magnitude(f.x), finite_magnitude(f.y)));
      }
    }
    for (int step = 1; step < 32; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
    if (thread % 32 == 0) s.warp_scale[thread / 32] = largest;
    ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
    for (int w = 0; w < kWarpsOfGroup; ++w) largest = fmaxf(largest, s.warp_scale[w]);
    const int exponent = largest > 0.0f ? min(14 - ilogbf(largest), 120) : 0;
    const float power = ldexpf(1.0f, exponent);
    factors.of[first / kScaledHeads<kHeads>] = ldexpf(1.0f, -exponent);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      std::uint32_t pair[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
      for (std::uint32_t& two : pair) {
        const float2 f = floats<Work::kBf16>(two);
        const __half2 h = __floats2half2_rn(f.x * power, f.y * power);
        two = reinterpret_cast<const std::uint32_t&>(h);
      }
      place.store(
          q + (2 * (i % kBlocks) + place.odd) * Chunk::kChunkBytes + (first / 8 + i / kBlocks) * Chunk::kAtom,
          pair);
    }
  }
  for (int eight = place.odd; eight < kHeads / 8; eight += 2) {
    const uint4 x = work.query(item, eight * 8 + place.row, Row::kLatent + place.rope_column());
    place.store(q_rope + eight * Chunk::kAtom, {x.x, x.y, x.z, x.w});
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
  return factors;
}

}  // namespace flash_mla::sm90::fp8_decode
