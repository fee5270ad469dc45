#pragma once

// What a call of top_k is on the device, and a block's shared memory.

#include "kernels/attention/top_k/sm90/block.cuh"

namespace flash_mla::sm90::top_k_kernel {

inline constexpr int kMaxCluster = 8;
inline constexpr unsigned kCapacity = 8192;  // candidates
inline constexpr int kWindow = 131072;       // positions of a map
inline constexpr int kWords = kWindow / 32;
inline constexpr int kMinSample = 4096, kMaxSample = 16384;
inline constexpr int kVec = 4, kUnroll = 4;  // scores of a load, loads in flight of a thread

struct Params {
  const float* logits;
  long long logits_stride, width;
  const int* lengths;
  const int* row_starts;   // or null
  const int* offsets;      // or null
  const int* block_table;  // or null
  long long table_stride, page_size;
  const int* row_request;  // or null
  long long first_row, rows_per_request;
  int* indices;
  long long indices_stride;
  int k;
};

struct Shared {
  BlockShared block;
  unsigned num_candidates;
  unsigned least, most;  // keys of candidates
  unsigned boundary_key, boundary_ties;
  unsigned num_close, close[kThreads];  // keys that share the boundary's digit
  unsigned list[2 * kCapacity];  // keys of candidates, then their positions; before that, keys of the sample
  unsigned above[kWords], equal[kWords];
};

/// Key and how many of its equals: everything above the key, and the first `ties` that equal it.
struct Boundary {
  unsigned key, ties;
};

__device__ inline float score_of(unsigned key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

}  // namespace flash_mla::sm90::top_k_kernel
