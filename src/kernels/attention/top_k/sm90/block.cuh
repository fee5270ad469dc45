#pragma once

// What a block of threads does together on small arrays in shared memory: prefix sums, and the digit of a
// histogram at which a rank is reached.

namespace flash_mla::sm90::top_k_kernel {

inline constexpr int kThreads = 512;
inline constexpr int kWarp = 32, kWarps = kThreads / kWarp;
inline constexpr int kBins = 2048, kDigitBits = 11;

struct BlockShared {
  uint4 histogram[kBins / 4];  // as words: counter(), all 0 but between the first count_digit and find_digit
  unsigned sums[2][kWarps];
  unsigned found_digit, found_rank, found_count;

  __device__ unsigned* counters() { return reinterpret_cast<unsigned*>(histogram); }
};

__device__ inline unsigned up_to_lane(unsigned x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned before = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

/// Sums of two numbers over the threads before this one, and over all threads. Synchronises the block.
struct Prefix {
  unsigned a, b, total_a, total_b;
};
__device__ inline Prefix prefix_sum(BlockShared& s, unsigned a, unsigned b) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned up_to_a = up_to_lane(a), up_to_b = up_to_lane(b);
  if (lane == kWarp - 1) {
    s.sums[0][warp] = up_to_a;
    s.sums[1][warp] = up_to_b;
  }
  __syncthreads();
  const bool there = lane < kWarps;
  const unsigned sum_a = there ? s.sums[0][lane] : 0, sum_b = there ? s.sums[1][lane] : 0;
  Prefix p;
  p.a = up_to_a - a + __reduce_add_sync(~0u, lane < warp ? sum_a : 0);
  p.b = up_to_b - b + __reduce_add_sync(~0u, lane < warp ? sum_b : 0);
  p.total_a = __reduce_add_sync(~0u, sum_a);
  p.total_b = __reduce_add_sync(~0u, sum_b);
  __syncthreads();  // sums may be written again
  return p;
}

/// The least and the greatest of the threads' numbers, in all threads. Synchronises the block.
struct Range {
  unsigned least, most;
};
__device__ inline Range range_of(BlockShared& s, unsigned least, unsigned most) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  least = __reduce_min_sync(~0u, least);
  most = __reduce_max_sync(~0u, most);
  if (lane == 0) {
    s.sums[0][warp] = least;
    s.sums[1][warp] = most;
  }
  __syncthreads();
  const Range range{__reduce_min_sync(~0u, s.sums[0][lane % kWarps]),
                    __reduce_max_sync(~0u, s.sums[1][lane % kWarps])};
  __syncthreads();  // sums may be written again
  return range;
}

/// Bits that a number up to `most` is shifted by so that a digit is left.
__device__ inline int digit_shift(unsigned most) {
  return max(32 - __clz(static_cast<int>(most)) - kDigitBits, 0);
}

/// One more of `digit` for every thread that `counts`; whole warps call it. Rows of equal scores would otherwise
/// queue up at one counter.
__device__ inline void count_digit(BlockShared& s, unsigned digit, bool counts) {
  const unsigned counting = __ballot_sync(~0u, counts);
  if (counting == 0) return;
  const int first = __ffs(static_cast<int>(counting)) - 1;
  const unsigned leading = __shfl_sync(~0u, digit, first);
  const unsigned same = __ballot_sync(~0u, counts && digit == leading);
  if (same == counting) {
    if (static_cast<int>(threadIdx.x) % kWarp == first) {
      atomicAdd(s.counters() + digit, static_cast<unsigned>(__popc(counting)));
    }
  } else if (counts) {
    atomicAdd(s.counters() + digit, 1u);
  }
}

__device__ inline void clear_histogram(BlockShared& s) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins / 4; i += kThreads)
    s.histogram[i] = uint4{0, 0, 0, 0};
}

/// The highest digit such that it and those above it have at least `rank` keys (found_digit; the lowest there is
/// where all together have fewer), how many of its own they include (found_rank) and how many it has
/// (found_count). Leaves the histogram cleared.
__device__ inline void find_digit(BlockShared& s, unsigned rank) {
  static_assert(kBins == 4 * kThreads);
  __syncthreads();
  const int top = kThreads - 1 - static_cast<int>(threadIdx.x);
  const uint4 four = s.histogram[top];
  s.histogram[top] = uint4{0, 0, 0, 0};
  const unsigned own = four.x + four.y + four.z + four.w;
  if (threadIdx.x == 0) {
    s.found_digit = 0;
    s.found_rank = s.found_count = 0;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned up_to = up_to_lane(own);
  if (lane == kWarp - 1) s.sums[0][warp] = up_to;
  __syncthreads();
  unsigned before =
      up_to - own + __reduce_add_sync(~0u, lane < warp && lane < kWarps ? s.sums[0][lane % kWarps] : 0);
  if (before < rank && rank <= before + own) {
    const unsigned counts[4] = {four.w, four.z, four.y, four.x};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (before < rank && rank <= before + counts[i]) {
        s.found_digit = static_cast<unsigned>(4 * top + 3 - i);
        s.found_rank = rank - before;
        s.found_count = counts[i];
      }
      before += counts[i];
    }
  }
  __syncthreads();
}

}  // namespace flash_mla::sm90::top_k_kernel
