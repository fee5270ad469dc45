#pragma once

// Kernels of the benchmark of sparse attention and FP8 caches: data, a reference. Each call queues one kernel.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kv/format.h"

namespace flash_mla::bench::gpu {

/// Fills every token of a pool with values of a deviation of a half. Scales of kFp8V32 are no powers of two.
/// kBFloat16, kFp8V32 and kFp8V4.
void fill_tokens(const kv::Pool& pool, std::uint64_t seed, cudaStream_t stream);

/// A row of the output: a query's head, and the slots that it attends to, which are
/// slots[begin .. begin + count) of the first cache and as many behind them as `extra_count` of the second.
struct ListedRow {
  std::int64_t query;  ///< row of q (rows, d_qk)
  std::int64_t begin;
  int count, extra_count;
};

/// Attention of the rows in float64 over the dequantised caches. q is bfloat16; `scores`: count * score_stride
/// doubles of scratch; `out` (count, 512) and `lse` (count) float32.
struct ListedRows {
  const void* q;
  kv::Pool pools[2];
  const std::int32_t* slots;
  const ListedRow* rows;
  int count;
  double softmax_scale;
  double* scores;
  std::int64_t score_stride;
  float* out;
  float* lse;
};
void reference_listed_rows(const ListedRows& problem, cudaStream_t stream);

}  // namespace flash_mla::bench::gpu
