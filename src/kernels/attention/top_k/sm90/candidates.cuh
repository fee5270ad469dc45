#pragma once

// Which scores of a row may be among its k largest: those that reach a threshold taken from a sample.

#include "kernels/attention/top_k/order_key.h"
#include "kernels/attention/top_k/sm90/params.cuh"

namespace flash_mla::sm90::top_k_kernel {

inline constexpr int kVec = 4, kUnroll = 4;  // scores of a load, loads in flight of a thread
inline constexpr int kMinPlaces = kThreads, kMaxPlaces = 4096;

/// How many of the sample's scores reach the threshold, and how many pairs the sample has.
struct SampleSize {
  int places;
  unsigned rank;
};

/// 4 deviations above what the k largest have in the sample. More of it where the candidates would hardly fit.
__device__ inline SampleSize sample_size(int n, int k) {
  const float of_k = 3 * k <= static_cast<int>(kCapacity) ? 8.0f : 64.0f;  // pairs among the k largest
  int places = kMinPlaces;
#pragma unroll 1
  while (places < kMaxPlaces &&
         static_cast<float>(places) * static_cast<float>(k) < of_k * static_cast<float>(n))
    places *= 2;
  const float scale = __fdividef(2.0f * static_cast<float>(places), static_cast<float>(n));
  const float share = scale * static_cast<float>(k), room = 0.75f * scale * static_cast<float>(kCapacity);
  float deviation;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(deviation) : "f"(share));
  return {places, static_cast<unsigned>(fmaxf(fminf(share + 4.0f * deviation + 4.0f, room), 1.0f))};
}

/// `least` is a key that more than k scores should reach, and not more than there is room for; the same in all blocks of
/// a cluster. `most` is the greatest key of the sample. The sample is a pair of scores (a sector brings more than one) of each of as many equal stretches of the
/// row, at a place in it that looks random; `keys` has room for kMaxPlaces. The histogram is cleared before and after.
__device__ inline Range sample_range(const Row& row, int k, uint2* keys, BlockShared& s) {
  constexpr int kLoads = 4;
  const SampleSize size = sample_size(row.n, k);
  const auto skip =
      static_cast<unsigned>(reinterpret_cast<unsigned long long>(row.scores) / sizeof(float) % 2);
  const auto* pairs = reinterpret_cast<const float2*>(row.scores + skip);
  const unsigned stretch = (static_cast<unsigned>(row.n) - skip) / 2 / static_cast<unsigned>(size.places);
  unsigned least = ~0u, most = 0;
#pragma unroll 1
  for (int first = 0; first < size.places; first += kLoads * kThreads) {
    float2 x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const auto i = threadIdx.x + static_cast<unsigned>(first + j * kThreads);
      if (first + j * kThreads < size.places)
        x[j] = __ldg(pairs + i * stretch + __umulhi(i * 2654435761u, stretch));
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (first + j * kThreads >= size.places) break;
      const uint2 key{selection::order_key(x[j].x), selection::order_key(x[j].y)};
      keys[first + j * kThreads + static_cast<int>(threadIdx.x)] = key;
      least = min(least, min(key.x, key.y));
      most = max(most, max(key.x, key.y));
    }
  }
  // Only keys near the top matter: of so many groups of threads that the rank is reached, each has one from `least`
  // on that is the least of the groups' greatest.
  unsigned greatest = most;
  int groups = kThreads;
#pragma unroll
  for (int lanes = 1; lanes <= 4; lanes *= 2) {
    if (size.rank > static_cast<unsigned>(groups / 2)) break;
    greatest = max(greatest, __shfl_xor_sync(~0u, greatest, lanes));
    groups /= 2;
  }
  const Range range = range_of(s, size.rank <= kThreads ? greatest : least, most);
  const int shift = digit_shift(range.most - range.least);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < size.places; i += kThreads) {
    const uint2 key = keys[i];
    count_digit(s, (key.x - range.least) >> shift & (kBins - 1), key.x >= range.least);
    count_digit(s, (key.y - range.least) >> shift & (kBins - 1), key.y >= range.least);
  }
  find_digit(s, size.rank);
  return {range.least + (s.found_digit << shift), range.most};
}

/// Takes candidates of a part of the row into the block's list. More than there is room for are only counted.
class Collector {
 public:
  __device__ Collector(const Row& row, Shared& s, float threshold)
      : row_(row), s_(s), threshold_(threshold) {}

  /// The candidates of positions [begin, end). The next loads are on their way while these are looked at.
  __device__ void collect(int begin, int end) const {
    const int thread = static_cast<int>(threadIdx.x);
    const auto address = reinterpret_cast<unsigned long long>(row_.scores + begin);
    // Scores before the first address that is a multiple of 16 bytes, and those behind the last whole vector.
    const int head = min(static_cast<int>((16 - address % 16) % 16 / 4), end - begin);
    const int vectors = (end - begin - head) / kVec, tail = begin + head + vectors * kVec;
    const auto* from = reinterpret_cast<const float4*>(row_.scores + begin + head);
    Loads next = load(from, thread, vectors);
    if (thread < head) consider(begin + thread);
    if (tail + thread < end) consider(tail + thread);
    constexpr int kRound = kThreads * kUnroll;
#pragma unroll 1
    for (int round = thread; round - thread < vectors; round += kRound) {  // by whole warps
      const Loads here = next;
      next = load(from, round + kRound, vectors);
      keep(here, round, vectors, begin + head);
    }
  }

 private:
  struct Loads {
    float4 x[kUnroll];
  };
  __device__ static Loads load(const float4* from, int first, int vectors) {
    Loads to;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int v = first + j * kThreads;
      if (v < vectors) to.x[j] = __ldcs(from + v);
    }
    return to;
  }

  /// A candidate of a thread on its own.
  __device__ void consider(int position) const {
    const float score = __ldg(row_.scores + position);
    if (score < threshold_) return;  // NaN is not below anything
    const unsigned slot = atomicAdd(&s_.num_candidates, 1u);
    if (slot < kCapacity) put(slot, score, position);
  }

  __device__ void put(unsigned slot, float score, int position) const {
    s_.list[slot] = __float_as_uint(score);
    s_.list[kCapacity + slot] = static_cast<unsigned>(position);
  }

  /// The candidates among a thread's loads; a warp takes room for all of its lanes at once.
  __device__ void keep(const Loads& loads, int first, int vectors, int begin) const {
    unsigned hits = 0;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const float4 x = loads.x[j];
      const unsigned four = (x.x < threshold_ ? 0u : 1u) | (x.y < threshold_ ? 0u : 2u) |
                            (x.z < threshold_ ? 0u : 4u) | (x.w < threshold_ ? 0u : 8u);
      hits |= (first + j * kThreads < vectors ? four : 0u) << 4 * j;
    }
    if (!__any_sync(~0u, hits != 0)) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto own = static_cast<unsigned>(__popc(hits));
    const unsigned up_to = up_to_lane(own);
    unsigned slot = 0;
    if (lane == kWarp - 1) slot = atomicAdd(&s_.num_candidates, up_to);
    slot = __shfl_sync(~0u, slot, kWarp - 1) + up_to - own;
    if (slot + own > kCapacity) return;
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const float x[kVec] = {loads.x[j].x, loads.x[j].y, loads.x[j].z, loads.x[j].w};
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if ((hits >> (4 * j + i) & 1) == 0) continue;
        put(slot++, x[i], begin + (first + j * kThreads) * kVec + i);
      }
    }
  }

  const Row& row_;
  Shared& s_;
  float threshold_;
};

__device__ inline unsigned in_first_block(const void* own) {
  const auto here = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
  return there;
}

/// Adds the block's list to that of the cluster's first block, which has to be there and may be taking candidates itself.
/// A list with more than there is room for is only counted.
__device__ inline void send_candidates(Shared& s) {
  const unsigned own = s.num_candidates;
  if (threadIdx.x == 0) {
    asm volatile("atom.relaxed.cluster.shared::cluster.add.u32 %0, [%1], %2;"
                 : "=r"(s.first_slot)
                 : "r"(in_first_block(&s.num_candidates)), "r"(own)
                 : "memory");
  }
  __syncthreads();
  const unsigned first = s.first_slot;
  if (own > kCapacity || first > kCapacity - own) return;
  const unsigned to = in_first_block(s.list) + 4 * first;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < own; i += kThreads) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to + 4 * i), "r"(s.list[i]) : "memory");
    asm volatile("st.shared::cluster.u32 [%0 + %2], %1;" ::"r"(to + 4 * i), "r"(s.list[kCapacity + i]),
                 "n"(kCapacity * 4)
                 : "memory");
  }
}

}  // namespace flash_mla::sm90::top_k_kernel
