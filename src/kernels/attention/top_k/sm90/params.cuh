#pragma once

// What a call of top_k is on the device, one row of it, and a block's shared memory.

#include "kernels/attention/top_k/sm90/block.cuh"

namespace flash_mla::sm90::top_k_kernel {

inline constexpr int kMaxCluster = 8;
inline constexpr unsigned kCapacity = 8192;  // candidates
inline constexpr int kWindow = 131072;       // positions of a map
inline constexpr int kWords = kWindow / 32;

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

/// The search for a boundary.
struct BoundaryShared {
  unsigned key, ties;                   // what is found, where one thread finds it
  unsigned num_close, close[kThreads];  // keys that share the boundary's digit
};

struct Shared {
  BlockShared block;
  BoundaryShared boundary;
  unsigned num_candidates, first_slot;
  unsigned list[2 * kCapacity];  // scores of candidates, then their positions
  uint4 above[kWords / 4],
      equal[kWords / 4];  // maps of positions, as words: map(); before, the sample's keys
};

__device__ inline unsigned* map(uint4* words) { return reinterpret_cast<unsigned*>(words); }

/// Key and how many of its equals: everything above the key, and the first `ties` that equal it.
struct Boundary {
  unsigned key, ties;
};

__device__ inline float score_of(unsigned key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

struct Row {
  const float* scores;
  int n;
  int offset = 0;
  unsigned page_size;
  const int* table = nullptr;
  int* out;

  __device__ Row(const Params& p, long long row) : page_size(static_cast<unsigned>(p.page_size)) {
    const long long start = p.row_starts != nullptr ? p.row_starts[row] : 0;
    const long long room = start >= 0 && start < p.width ? p.width - start : 0;
    n = static_cast<int>(min(max(static_cast<long long>(p.lengths[row]), 0ll), room));
    scores = p.logits + row * p.logits_stride + start;
    if (p.offsets != nullptr) offset = p.offsets[row];
    if (p.block_table != nullptr) {
      const auto nth = static_cast<unsigned>(p.first_row + row),
                 per_request = static_cast<unsigned>(p.rows_per_request);
      const unsigned request =
          p.row_request != nullptr ? static_cast<unsigned>(p.row_request[row]) : nth / per_request;
      table = p.block_table + request * p.table_stride;
    }
    out = p.indices + row * p.indices_stride;
  }

  /// What the caller wants to have of a position. Positions with their offset, and slots, are int32.
  __device__ int place(int position) const {
    const auto at = static_cast<unsigned>(position) + static_cast<unsigned>(offset);
    if (table == nullptr) return static_cast<int>(at);
    return table[at / page_size] * static_cast<int>(page_size) + static_cast<int>(at % page_size);
  }
};

}  // namespace flash_mla::sm90::top_k_kernel
