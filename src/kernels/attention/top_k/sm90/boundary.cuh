#pragma once

// The key that the k-th largest score has, among candidates or among all scores of a row.

#include "kernels/attention/top_k/order_key.h"
#include "kernels/attention/top_k/sm90/params.cuh"

namespace flash_mla::sm90::top_k_kernel {

/// Where keys come from: each() calls f(key, there) by whole warps, of which the last have lanes without a key.
/// Candidates are few rounds of a loop: small code is worth more there, for it is fetched from memory.
struct CandidateKeys {
  const unsigned* scores;
  unsigned count;

  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll 1
    for (unsigned first = 0; first < count; first += kThreads) {
      const unsigned i = first + threadIdx.x;
      f(i < count ? selection::order_key(__uint_as_float(scores[i])) : 0, i < count);
    }
  }
};

/// Keys as they are in shared memory, behind the last one's 0 up to a multiple of kUnroll * kThreads.
struct StoredKeys {
  static constexpr unsigned kUnroll = 4;
  const unsigned* keys;
  unsigned count;

  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll 1
    for (unsigned first = threadIdx.x; first - threadIdx.x < count; first += kUnroll * kThreads) {
      unsigned key[kUnroll];
#pragma unroll
      for (unsigned j = 0; j < kUnroll; ++j) key[j] = keys[first + j * kThreads];
#pragma unroll
      for (unsigned j = 0; j < kUnroll; ++j) f(key[j], key[j] != 0);  // no score has the key 0
    }
  }
};

struct RowKeys {
  const Row& row;

  template <class F>
  __device__ void each(const F& f) const {
    constexpr int kLoads = 8;
    const auto n = static_cast<unsigned>(row.n);
#pragma unroll 1
    for (unsigned first = threadIdx.x; first - threadIdx.x < n; first += kThreads * kLoads) {
      float x[kLoads];
#pragma unroll
      for (unsigned j = 0; j < kLoads; ++j) x[j] = __ldg(row.scores + min(first + j * kThreads, n - 1));
#pragma unroll
      for (unsigned j = 0; j < kLoads; ++j) f(selection::order_key(x[j]), first + j * kThreads < n);
    }
  }
};

/// By digits of the keys, from the top: up to three counts. The histogram is cleared before and after.
template <class Keys>
__device__ Boundary find_boundary(const Keys& keys, BlockShared& b, unsigned k) {
  unsigned prefix = 0, wanted = k;
  int shift = 32;
#pragma unroll 1
  do {
    const int bits = min(shift, kDigitBits), low = shift - bits;
    // The bits above the digit are those found so far. (This shift by 32 gives 0.)
    keys.each([&](unsigned key, bool there) {
      count_digit(b, key >> low & ((1u << bits) - 1), there && __funnelshift_rc(key, 0, shift) == prefix);
    });
    find_digit(b, wanted);
    prefix = prefix << bits | b.found_digit;
    wanted = b.found_rank;
    shift = low;
    // Where all keys of a digit are wanted its lower bits decide nothing.
  } while (shift > 0 && b.found_count != wanted);
  const unsigned key = prefix << shift;
  // All keys from there up: none is its equal if it moves down by one, for no key is 0.
  return b.found_count == wanted ? Boundary{key - 1, 0} : Boundary{key, wanted};
}

/// The same for keys that are close to each other, none below `range.least`: digits of their distance from there tell more
/// than digits of keys; the last of them takes all above `range.most`. Where the boundary's digit has few keys, each is
/// compared with all of them.
template <class Keys>
__device__ Boundary find_close_boundary(const Keys& keys, BlockShared& b, BoundaryShared& s, Range range,
                                        unsigned k) {
  constexpr unsigned kLast = kBins - 1;
  if (threadIdx.x == 0) s.num_close = 0;
  const int shift = digit_shift(range.most - range.least);
  const auto digit_of = [&](unsigned key) { return min((key - range.least) >> shift, kLast); };
  keys.each([&](unsigned key, bool there) { count_digit(b, digit_of(key), there); });
  find_digit(b, k);
  const unsigned digit = b.found_digit, wanted = b.found_rank, found = b.found_count;
  const unsigned lowest = range.least + (digit << shift);
  // As above.
  if (found == wanted) return {lowest - 1, 0};
  if (shift == 0 && digit < kLast) return {lowest, wanted};
  if (found > kThreads) return find_boundary(keys, b, k);
  keys.each([&](unsigned key, bool there) {
    if (there && digit_of(key) == digit) s.close[atomicAdd(&s.num_close, 1u)] = key;
  });
  __syncthreads();
  if (threadIdx.x < found) {
    const unsigned key = s.close[threadIdx.x];
    unsigned above = 0, equal = 0;
    for (unsigned i = 0; i < found; ++i) {
      above += s.close[i] > key;
      equal += s.close[i] == key;
    }
    if (above < wanted && wanted <= above + equal) {  // one key, the same for all that have it
      s.key = key;
      s.ties = wanted - above;
    }
  }
  __syncthreads();
  return {s.key, s.ties};
}

}  // namespace flash_mla::sm90::top_k_kernel
