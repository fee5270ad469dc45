#pragma once

// Q of an item into shared memory, in the order of k in which the warpgroup of scores takes a row's columns.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::fp8_decode {

/// Of Q's latent part: unit i of eight columns, of `kHeads` x 64: where it is read and where its pairs go.
struct QueryUnit {
  int head, column;  ///< of the eight columns the first
  int chunk, word;   ///< pair p goes to 16-byte word word + p of the chunk's row, at byte 4 c
  int c;
};
constexpr QueryUnit latent_unit(int i) {
  // c fastest, then the eight rows of a swizzle's atom: the stores of a warp hit all banks.
  const int c = i % 4, row = i / 4 % 8, half = i / 32 % 2, chunk = i / 64 % 8, head = i / 512 * 8 + row;
  return {head, chunk / 2 * 128 + 32 * c + chunk % 2 * 16 + 8 * half, chunk, 4 * half, c};
}
/// The same of the rope part, `kHeads` x 8 units.
constexpr QueryUnit rope_unit(int i) {
  const int c = i % 4, row = i / 4 % 8, half = i / 32 % 2, head = i / 64 * 8 + row;
  return {head, 16 * c + 8 * half, 0, 4 * half, c};
}

__device__ __forceinline__ void store_pairs(std::uint32_t chunk, const QueryUnit& u,
                                            const std::uint32_t (&pair)[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(ptx::swizzled_word(chunk, u.head, u.word + p) + 4 * u.c),
                 "r"(pair[p])
                 : "memory");
  }
}

/// The latent part as fp16, times a power of two that brings the largest finite element of all heads to 2^14; the
/// power's inverse is returned. Rows that are no heads become zeros. For all threads of the warpgroup of scores, which
/// afterwards see it as an operand.
template <int kHeads, class Work>
__device__ float load_query(const Work& work, Smem<kHeads>& s, int req) {
  constexpr int kUnits = kHeads * Row::kLatent / 8, kRopeUnits = kHeads * kv::kRopeWidth / 8;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  float largest = 0.0f;
#pragma unroll 4
  for (int i = thread; i < kUnits; i += kGroupThreads) {
    const QueryUnit u = latent_unit(i);
    const uint4 x = work.query(req, u.head, u.column);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(&x)[j]);
      largest = fmaxf(largest, isfinite(f.x) ? fabsf(f.x) : 0.0f);
      largest = fmaxf(largest, isfinite(f.y) ? fabsf(f.y) : 0.0f);
    }
  }
  for (int step = 1; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
  if (thread % 32 == 0) s.warp_scale[thread / 32] = largest;
  ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
  for (int w = 0; w < kWarpsOfGroup; ++w) largest = fmaxf(largest, s.warp_scale[w]);
  const int exponent = largest > 0.0f ? min(14 - ilogbf(largest), 120) : 0;
  const float power = ldexpf(1.0f, exponent);
  const std::uint32_t q = ptx::smem_address(s.q.at(0)), q_rope = ptx::smem_address(s.q_rope.at(0));
#pragma unroll 4
  for (int i = thread; i < kUnits; i += kGroupThreads) {
    const QueryUnit u = latent_unit(i);
    const uint4 x = work.query(req, u.head, u.column);
    std::uint32_t pair[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(&x)[j]);
      const __half2 h = __floats2half2_rn(f.x * power, f.y * power);
      pair[j] = reinterpret_cast<const std::uint32_t&>(h);
    }
    store_pairs(q + u.chunk * ptx::Tile<__half, kHeads, 64>::kChunkBytes, u, pair);
  }
#pragma unroll
  for (int i = thread; i < kRopeUnits; i += kGroupThreads) {
    const QueryUnit u = rope_unit(i);
    const uint4 x = work.query(req, u.head, Row::kLatent + u.column);
    const std::uint32_t pair[4] = {x.x, x.y, x.z, x.w};
    store_pairs(q_rope, u, pair);
  }
  ptx::fence_async_proxy();
  ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
  return ldexpf(1.0f, -exponent);
}

}  // namespace flash_mla::sm90::fp8_decode
