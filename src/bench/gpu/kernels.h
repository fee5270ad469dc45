#pragma once

// Kernels of the GPU benchmark: data, cold caches, a reference. Each call queues one kernel on `stream`.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "flash_mla/tensor.h"

namespace flash_mla::bench::gpu {

/// clamp(N(0, 1) / 2, -1, 1), each element a function of its index and `seed`. `dtype` bfloat16 or float16.
void fill_normal(void* data, DType dtype, std::int64_t count, std::uint64_t seed, cudaStream_t stream);

/// Reads `bytes` (a multiple of 16); `sink` is an uint32 that keeps the compiler from leaving that out.
void read_all(const void* data, std::size_t bytes, std::uint32_t* sink, cudaStream_t stream);

/// Copies `bytes` (a multiple of 16) as fast as a kernel can.
void copy_all(const void* from, void* to, std::size_t bytes, cudaStream_t stream);

/// Keeps the stream busy for that many clocks, so that what is queued behind starts with the host ahead.
void spin(long long clocks, cudaStream_t stream);

/// Adds the number of NaN among `count` elements (float32, bfloat16 or float16) to *counter.
void count_nan(const void* data, DType dtype, std::int64_t count, unsigned long long* counter,
               cudaStream_t stream);

/// A row of the output.
struct OutputRow {
  int request, query, head;
};

/// Dense decode of some rows in fp32, as plainly as possible. Tensors are contiguous, head_dim 576 / 512.
struct ReferenceProblem {
  const void* q;
  const void* k_cache;
  DType dtype;
  const std::int32_t* block_table;
  const std::int32_t* cache_seqlens;
  int s_q, h_q, h_kv, page_size, max_blocks;
  float softmax_scale;
  bool causal;
};
/// `scores`: count * score_stride floats of scratch, score_stride >= the longest length. `out` (count, 512)
/// and `lse` (count) float32.
void reference_rows(const ReferenceProblem& problem, const OutputRow* rows, int count, float* scores,
                    std::int64_t score_stride, float* out, float* lse, cudaStream_t stream);

}  // namespace flash_mla::bench::gpu
