#pragma once

// Rows of up to 8192 scores, which all fit into shared memory: no sample, no candidates, and a position is a place in the
// list.

#include "kernels/attention/top_k/order_key.h"
#include "kernels/attention/top_k/sm90/boundary.cuh"
#include "kernels/attention/top_k/sm90/params.cuh"

namespace flash_mla::sm90::top_k_kernel {

inline constexpr int kShortWords = static_cast<int>(kCapacity) / 32;

struct ShortShared {
  BlockShared block;
  BoundaryShared boundary;
  unsigned keys[kCapacity];
  unsigned above[kShortWords], equal[kShortWords];  // maps of positions
  unsigned before[kShortWords];  // those above (high half) and equal (low half) before a word
};

/// Stores the row's keys, and zeros behind them; returns their range. (Loads past the end are of the last score: a branch
/// for each would make them wait for one another.)
__device__ inline Range load_short_row(const Row& row, ShortShared& s) {
  constexpr int kLoads = 8;
  static_assert(kLoads % StoredKeys::kUnroll == 0 && kCapacity % (kLoads * kThreads) == 0);
  unsigned least = ~0u, most = 0;
#pragma unroll 1
  for (int round = 0; round < row.n; round += kThreads * kLoads) {
    const int first = round + static_cast<int>(threadIdx.x);
    float x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) x[j] = __ldg(row.scores + min(first + j * kThreads, row.n - 1));
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const unsigned key = selection::order_key(x[j]);
      least = min(least, key);
      most = max(most, key);
      s.keys[first + j * kThreads] = first + j * kThreads < row.n ? key : 0;
    }
  }
  return range_of(s.block, least, most);
}

/// Writes the positions of everything above the boundary and of the first of its equals, in order.
__device__ inline void emit_short_row(const Row& row, ShortShared& s, Boundary boundary) {
  const StoredKeys keys{s.keys, static_cast<unsigned>(row.n)};
  unsigned i = threadIdx.x;
  keys.each([&](unsigned key, bool there) {
    const unsigned above = __ballot_sync(~0u, there && key > boundary.key);
    const unsigned equal = __ballot_sync(~0u, there && key == boundary.key);
    if (i % kWarp == 0) {
      s.above[i / kWarp] = above;
      s.equal[i / kWarp] = equal;
    }
    i += kThreads;
  });
  __syncthreads();
  const unsigned word = threadIdx.x;
  const bool there = word < (static_cast<unsigned>(row.n) + kWarp - 1) / kWarp;
  const Prefix up_to = prefix_sum(s.block, there ? static_cast<unsigned>(__popc(s.above[word])) : 0,
                                  there ? static_cast<unsigned>(__popc(s.equal[word])) : 0);
  if (there) s.before[word] = up_to.a << 16 | up_to.b;
  __syncthreads();
  i = threadIdx.x;
  keys.each([&](unsigned key, bool valid) {
    const unsigned place = i;
    i += kThreads;
    if (!valid || key < boundary.key) return;
    const unsigned lower = (1u << place % kWarp) - 1, before = s.before[place / kWarp];
    const unsigned above = (before >> 16) + static_cast<unsigned>(__popc(s.above[place / kWarp] & lower));
    const unsigned equal = (before & 0xFFFFu) + static_cast<unsigned>(__popc(s.equal[place / kWarp] & lower));
    if (key == boundary.key && equal >= boundary.ties) return;
    row.out[above + min(equal, boundary.ties)] = row.place(static_cast<int>(place));
  });
}

__device__ inline void select_short_row(const Row& row, ShortShared& s, int k) {
  clear_histogram(s.block);
  const Range range = load_short_row(row, s);
  const StoredKeys keys{s.keys, static_cast<unsigned>(row.n)};
  emit_short_row(row, s, find_close_boundary(keys, s.block, s.boundary, range, static_cast<unsigned>(k)));
}

}  // namespace flash_mla::sm90::top_k_kernel
