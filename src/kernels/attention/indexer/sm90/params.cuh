#pragma once

// What both kernels of the indexer's logits are told, and how a block finds its rows and keys.

#include "kernels/attention/indexer/rows.h"

namespace flash_mla::sm90::index_kernel {

struct Params {
  indexer::Rows rows;
  indexer::Logits logits;
  long long first, last;           // rows of the call
  long long first_request;         // of the first group
  long long span, groups_of_span;  // rows that share keys, and groups they make
  long long run;                   // keys of a block
  int head_tiles;
};

__device__ __forceinline__ float positive(float x) {
  float y = 0;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

/// The rows of a block, at most kRows that share keys, and the run of keys [begin, end) that it scores: nothing where
/// begin >= end.
template <int kRows>
struct BlockRows {
  const Params& p;
  long long row0;
  int rows;
  const int* table = nullptr;
  long long run_begin, run_end;

  __device__ explicit BlockRows(const Params& params) : p(params) {
    const indexer::Rows& r = p.rows;
    const long long group = blockIdx.x, request = p.first_request + group / p.groups_of_span;
    const long long begin =
        (r.table == nullptr ? p.first : request * p.span) + group % p.groups_of_span * kRows;
    const long long end = (r.table == nullptr ? p.last : min((request + 1) * p.span, p.last));
    row0 = max(begin, p.first);
    rows = static_cast<int>(min(begin + kRows, end) - row0);
    if (r.table != nullptr) table = r.table + request * r.table_stride;
    run_begin = blockIdx.y * p.run;
    run_end = blockIdx.y + 1 == gridDim.y ? 0x7FFFFFFFFFFFFFFFll : run_begin + p.run;
  }

  __device__ long long key_begin(int i) const {
    return p.rows.key_begin != nullptr ? max(p.rows.key_begin[row0 + i], 0) : 0;
  }
  __device__ long long key_end(int i) const {
    const indexer::Rows& r = p.rows;
    const long long row = row0 + i;
    const long long end = r.end_of_last_row ? r.key_end[row / r.rows_per_request] -
                                                  (r.rows_per_request - 1 - row % r.rows_per_request)
                                            : r.key_end[row];
    return min(max(end, 0ll), static_cast<long long>(r.max_keys));
  }
  /// The keys of the run that a row has.
  __device__ void find_keys(long long& begin, long long& end) const {
    begin = run_end, end = run_begin;
    for (int i = 0; i < rows; ++i) {
      if (key_begin(i) >= key_end(i)) continue;
      begin = min(begin, key_begin(i));
      end = max(end, key_end(i));
    }
    begin = max(begin, run_begin);
    end = min(end, run_end);
  }
  __device__ float* logits_of(int i) const { return p.logits.data + (row0 + i - p.first) * p.logits.stride; }

  /// -inf where the run has columns without a key.
  __device__ void clean() const {
    if (!p.logits.clean) return;
    const long long last = min(run_end, static_cast<long long>(p.logits.width));
    for (int i = 0; i < rows; ++i) {
      const long long from = p.logits.compressed ? 0 : key_begin(i);
      const long long to = from + max(key_end(i) - key_begin(i), 0ll);
      float* out = logits_of(i);
      for (long long c = run_begin + threadIdx.x; c < last; c += blockDim.x) {
        if (c < from || c >= to) out[c] = -__int_as_float(0x7F800000);
      }
    }
  }
};

}  // namespace flash_mla::sm90::index_kernel
