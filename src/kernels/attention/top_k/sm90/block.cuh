#pragma once

// What a block of threads does together on small arrays in shared memory: prefix sums, and the digit of a
// histogram at which a rank is reached.

namespace flash_mla::sm90::top_k_kernel {

inline constexpr int kThreads = 512;
inline constexpr int kWarp = 32, kWarps = kThreads / kWarp;
inline constexpr int kBins = 2048;

struct BlockShared {
  unsigned histogram[kBins];
  unsigned sums[2][kWarps];
  unsigned found_digit, found_rank, found_count;
};

/// Sums of two numbers over the threads before this one, and over all threads. Synchronises the block.
struct Prefix {
  unsigned a, b, total_a, total_b;
};
__device__ inline Prefix prefix_sum(BlockShared& s, unsigned a, unsigned b) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  unsigned up_to_a = a, up_to_b = b;
  for (int step = 1; step < kWarp; step *= 2) {
    const unsigned x = __shfl_up_sync(~0u, up_to_a, step), y = __shfl_up_sync(~0u, up_to_b, step);
    if (lane >= step) {
      up_to_a += x;
      up_to_b += y;
    }
  }
  if (lane == kWarp - 1) {
    s.sums[0][warp] = up_to_a;
    s.sums[1][warp] = up_to_b;
  }
  __syncthreads();
  Prefix p{up_to_a - a, up_to_b - b, 0, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) {
      p.a += s.sums[0][w];
      p.b += s.sums[1][w];
    }
    p.total_a += s.sums[0][w];
    p.total_b += s.sums[1][w];
  }
  __syncthreads();  // sums may be written again
  return p;
}

__device__ inline void clear_histogram(BlockShared& s) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) s.histogram[i] = 0;
  __syncthreads();
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
      atomicAdd(&s.histogram[digit], static_cast<unsigned>(__popc(counting)));
    }
  } else if (counts) {
    atomicAdd(&s.histogram[digit], 1u);
  }
}

/// The highest digit such that it and those above it have at least `rank` keys (found_digit; the lowest there is
/// where all together have fewer), how many of its own they include (found_rank) and how many it has
/// (found_count).
__device__ inline void find_digit(BlockShared& s, unsigned rank) {
  constexpr int kOwn = kBins / kThreads;
  __syncthreads();
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
  unsigned own = 0;
  for (int i = 0; i < kOwn; ++i) own += s.histogram[top - i];
  if (threadIdx.x == 0) {
    s.found_digit = 0;
    s.found_rank = s.found_count = 0;
  }
  const Prefix p = prefix_sum(s, own, 0);
  if (p.a < rank && rank <= p.a + own) {
    unsigned before = p.a;
    for (int i = 0; i < kOwn; ++i) {
      const unsigned n = s.histogram[top - i];
      if (rank <= before + n) {
        s.found_digit = static_cast<unsigned>(top - i);
        s.found_rank = rank - before;
        s.found_count = n;
        break;
      }
      before += n;
    }
  }
  __syncthreads();
}

}  // namespace flash_mla::sm90::top_k_kernel
