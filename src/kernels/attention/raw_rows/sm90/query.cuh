#pragma once

// Q of an item into shared memory, in the order of k in which the warpgroup of scores takes a row's columns.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/raw_rows/sm90/smem.cuh"
#include "kernels/ptx/tma.cuh"

namespace flash_mla::sm90::raw_rows {

/// Heads whose elements a thread holds at a time.
template <int kHeads>
inline constexpr int kHeldHeads = kHeads < 32 ? kHeads : 32;

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

/// Where a thread of the warpgroup reads and writes: eight columns of a row in eight, of every other chunk; its four pairs
/// of columns go to byte 4 c of four 16-byte words. c is fastest, then the row in a swizzle's atom, so that a warp's
/// stores hit all banks.
struct QueryPlace {
  int c, row, half, odd;
  __device__ explicit QueryPlace(int thread)
      : c(thread % 4), row(thread / 4 % 8), half(thread / 32 % 2), odd(thread / 64) {}
  __device__ void store(std::uint32_t rows_of_eight, const std::uint32_t (&pair)[4]) const {
#pragma unroll
    for (int p = 0; p < 4; ++p)
      ptx::store_shared_4(ptx::swizzled_word(rows_of_eight, row, 4 * half + p) + 4 * c, pair[p]);
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

template <int kHeads, class Work, class S>
struct QueryLoad {
  using F = typename S::Format;
  using Chunk = ptx::Tile<__half, kHeads, 64>;
  static constexpr int kEights = kHeldHeads<kHeads> / 8;
  static constexpr int kChunks = (F::kE4m3Chunks + 1) / 2;  // of a thread
  static constexpr int kLoads = kEights * kChunks;

  const Work& work;
  S& s;
  const QueryPlace place{static_cast<int>(threadIdx.x) % kGroupThreads};

  __device__ std::uint32_t chunk_at(int chunk, int eight) const {
    return ptx::smem_address(s.q.at(0)) + chunk * Chunk::kChunkBytes + eight * Chunk::kAtom;
  }
  // kHeldHeads heads from `first` on, as fp16 times a head's power of two; its inverse goes to s.q_factor.
  template <class Item>
  __device__ void load_scaled(const Item& item, int first) const {
    uint4 x[kLoads];
    float power[kEights];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int chunk = 2 * (i % kChunks) + place.odd;
      x[i] = chunk < F::kE4m3Chunks ? work.query(item, first + i / kChunks * 8 + place.row,
                                                 e4m3_column<F>(chunk, place.c) + 8 * place.half)
                                    : uint4{0, 0, 0, 0};
    }
    const int warp = static_cast<int>(threadIdx.x) / 32 % kWarpsOfGroup;
    ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      float largest = 0.0f;
#pragma unroll
      for (int i = e * kChunks; i < (e + 1) * kChunks; ++i) {
        for (const std::uint32_t two : {x[i].x, x[i].y, x[i].z, x[i].w}) {
          const float2 f = floats<Work::kBf16>(two);
          largest = fmaxf(largest, fmaxf(finite_magnitude(f.x), finite_magnitude(f.y)));
        }
      }
      // A row's columns are with the four lanes of its c, in each of the four warps.
      for (int step = 1; step < 4; step *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
      if (place.c == 0) s.exchange[warp][first + 8 * e + place.row] = largest;
    }
    ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int head = first + 8 * e + place.row;
      float largest = s.exchange[0][head];
      for (int w = 1; w < kWarpsOfGroup; ++w) largest = fmaxf(largest, s.exchange[w][head]);
      const int exponent = largest > 0.0f ? min(14 - ilogbf(largest), 120) : 0;
      power[e] = ldexpf(1.0f, exponent);
      if (warp == 0 && place.c == 0) s.q_factor[head] = ldexpf(1.0f, -exponent);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      std::uint32_t pair[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
      for (std::uint32_t& two : pair) {
        const float2 f = floats<Work::kBf16>(two);
        const __half2 h = __floats2half2_rn(f.x * power[i / kChunks], f.y * power[i / kChunks]);
        two = reinterpret_cast<const std::uint32_t&>(h);
      }
      const int chunk = 2 * (i % kChunks) + place.odd;
      if (F::kE4m3Chunks % 2 == 0 || chunk < F::kE4m3Chunks)
        place.store(chunk_at(chunk, first / 8 + i / kChunks), pair);
    }
  }
  // The chunks of Q's own type.
  template <class Item>
  __device__ void load_own(const Item& item) const {
    constexpr int kOwn = F::kHeadDim / 64 - F::kE4m3Chunks;
#pragma unroll 4
    for (int i = place.odd; i < kOwn * (kHeads / 8); i += 2) {
      const int chunk = F::kE4m3Chunks + i % kOwn, eight = i / kOwn;
      const uint4 x = work.query(item, eight * 8 + place.row, own_column(chunk, place.c) + 8 * place.half);
      place.store(chunk_at(chunk, eight), {x.x, x.y, x.z, x.w});
    }
  }
};

/// Q's chunks for e4m3 as fp16, a head's times the power of two that brings its largest finite element to 2^14; the powers'
/// inverses go to s.q_factor. The others as they are. Rows that are no heads become zeros. For all threads of the
/// warpgroup of scores, which afterwards see it as an operand.
template <int kHeads, class Work, class S, class Item>
__device__ void load_query(const Work& work, S& s, const Item& item) {
  const QueryLoad<kHeads, Work, S> load{work, s};
  if constexpr (S::Format::kE4m3Chunks > 0) {
#pragma unroll 1
    for (int first = 0; first < kHeads; first += kHeldHeads<kHeads>) load.load_scaled(item, first);
  }
  if constexpr (S::Format::kHeadDim > 64 * S::Format::kE4m3Chunks) load.load_own(item);
  ptx::fence_async_proxy();
  ptx::named_barrier_sync<kScoresReady, kGroupThreads>();
}

}  // namespace flash_mla::sm90::raw_rows
