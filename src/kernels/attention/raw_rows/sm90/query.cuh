#pragma once

// Q of an item into shared memory, in the order of k in which the warpgroup of scores takes a row's columns.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/fragment.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::raw_rows {

/// Where lane c of four has its 16 bytes of a row's chunk of e4m3: two chunks are loaded by turns from 128 bytes, of which
/// a lane has 32; the last of an odd number is 64 bytes by itself. Element k = 8 h + 2 c + e of the chunk's instruction t
/// is that column plus 4 t + 2 h + e.
template <class Format>
__device__ constexpr int e4m3_column(int chunk, int c) {
  const bool alone = chunk % 2 == 0 && chunk + 1 == Format::kE4m3Chunks;
  return alone ? chunk * 64 + 16 * c : chunk / 2 * 128 + 32 * c + chunk % 2 * 16;
}
/// The same of a chunk of 16-bit elements, of which a lane has 16: two words of 16 bytes, for two instructions each.
__device__ constexpr int own_column(int chunk, int c) { return chunk * 64 + 16 * c; }

/// Four pairs of columns 8 half to 8 half + 7 of a lane's 16 of a chunk: to byte 4 c of four 16-byte words of row `row` of
/// eight. A warp's stores hit all banks if its lanes have all c and either all rows or both halves and four rows.
__device__ __forceinline__ void store_query(std::uint32_t rows_of_eight, int row, int half, int c,
                                            const uint4& pairs) {
  ptx::store_shared_4(ptx::swizzled_word(rows_of_eight, row, 4 * half) + 4 * c, pairs.x);
  ptx::store_shared_4(ptx::swizzled_word(rows_of_eight, row, 4 * half + 1) + 4 * c, pairs.y);
  ptx::store_shared_4(ptx::swizzled_word(rows_of_eight, row, 4 * half + 2) + 4 * c, pairs.z);
  ptx::store_shared_4(ptx::swizzled_word(rows_of_eight, row, 4 * half + 3) + 4 * c, pairs.w);
}

template <bool kBf16>
__device__ __forceinline__ float2 floats(std::uint32_t x) {
  if constexpr (kBf16) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(x));
  }
}
template <bool kBf16>
__device__ __forceinline__ std::uint32_t scaled_halves(std::uint32_t x, float power) {
  const float2 f = floats<kBf16>(x);
  return pack2<false>(f.x * power, f.y * power);
}
/// The n for which 2^n brings a 16-bit element of this magnitude to [2^14, 2^15); within [-120, 120].
template <bool kBf16>
__device__ __forceinline__ int query_exponent(std::uint32_t magnitude) {
  const int e = static_cast<int>(magnitude >> (kBf16 ? 7 : 10));
  return kBf16 ? min(14 + 127 - e, 120) : 14 + 15 - max(e, 1);
}
__device__ __forceinline__ float power_of_two(int n) {
  return __uint_as_float(static_cast<std::uint32_t>(n + 127) << 23);
}

template <int kHeads, class Work, class S>
struct QueryLoad {
  using F = typename S::Format;
  using Chunk = ptx::Tile<__half, kHeads, 64>;
  static constexpr int kScaled = F::kE4m3Chunks > 0 ? F::kE4m3Chunks : 1;

  const Work& work;
  S& s;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;

  __device__ std::uint32_t chunk_at(int chunk, int eight) const {
    return ptx::smem_address(s.q.at(0)) + chunk * Chunk::kChunkBytes + eight * Chunk::kAtom;
  }
  // Eight columns of each chunk for e4m3, of a head of sixteen: a warp has four, eight lanes one.
  template <class Item>
  __device__ void ask_scaled(const Item& item, int first, uint4 (&x)[kScaled]) const {
    const int head = first + thread / 8;
#pragma unroll
    for (int i = 0; i < kScaled; ++i)
      x[i] = work.query(item, head, e4m3_column<F>(i, thread % 4) + 8 * (thread / 4 % 2));
  }
  // These as fp16 times the head's power of two; its inverse goes to s.q_factor.
  __device__ void store_scaled(int first, const uint4 (&x)[kScaled]) const {
    const int head = first + thread / 8;
    std::uint32_t two = 0;
#pragma unroll
    for (int i = 0; i < kScaled; ++i) {
      for (const std::uint32_t y : {x[i].x, x[i].y, x[i].z, x[i].w}) two = __vmaxu2(two, y & 0x7FFF7FFFu);
    }
    std::uint32_t largest = max(two & 0xFFFFu, two >> 16);
    for (int step = 1; step < 8; step *= 2)
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    const int exponent = query_exponent<Work::kBf16>(largest);
    const float power = power_of_two(exponent);
    if (thread % 8 == 0) s.q_factor[head] = power_of_two(-exponent);
#pragma unroll
    for (int i = 0; i < kScaled; ++i) {
      const auto halves = [&](std::uint32_t y) { return scaled_halves<Work::kBf16>(y, power); };
      store_query(chunk_at(i, head / 8), head % 8, thread / 4 % 2, thread % 4,
                  {halves(x[i].x), halves(x[i].y), halves(x[i].z), halves(x[i].w)});
    }
  }
  // Rolled: what runs once an item waits for its instructions.
  template <class Item>
  __device__ void load_scaled(const Item& item) const {
    uint4 x[kScaled], next[kScaled] = {};
    ask_scaled(item, 0, x);
#pragma unroll 1
    for (int first = 0; first < kHeads; first += 16) {
      if (first + 16 < kHeads) ask_scaled(item, first + 16, next);
      store_scaled(first, x);
#pragma unroll
      for (int i = 0; i < kScaled; ++i) x[i] = next[i];
    }
  }
  // The chunks of Q's own type: a warp has eight rows of half a chunk.
  template <class Item>
  __device__ void load_own(const Item& item) const {
    constexpr int kOwn = F::kHeadDim / 64 - F::kE4m3Chunks;
    const int c = thread % 4, row = thread / 4 % 8, half = thread / 32 % 2;
#pragma unroll 4
    for (int i = thread / 64; i < kOwn * (kHeads / 8); i += 2) {
      const int chunk = F::kE4m3Chunks + i % kOwn, eight = i / kOwn;
      store_query(chunk_at(chunk, eight), row, half, c,
                  work.query(item, eight * 8 + row, own_column(chunk, c) + 8 * half));
    }
  }
};

/// Q's chunks for e4m3 as fp16, a head's times the power of two that brings its largest element to 2^14; the powers'
/// inverses go to s.q_factor. The others as they are. Rows that are no heads become zeros. For all threads of the
/// warpgroup of scores, which afterwards see it as an operand.
template <int kHeads, class Work, class S, class Item>
__device__ void load_query(const Work& work, S& s, const Item& item) {
  const QueryLoad<kHeads, Work, S> load{work, s};
  if constexpr (S::Format::kE4m3Chunks > 0) load.load_scaled(item);
  if constexpr (S::Format::kHeadDim > 64 * S::Format::kE4m3Chunks) load.load_own(item);
  ptx::fence_async_proxy();
  ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
}

}  // namespace flash_mla::sm90::raw_rows
