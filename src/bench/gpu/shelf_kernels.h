#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "bench/gpu/kernels.h"

namespace flash_mla::bench::gpu {

/// Attention with keys and values of its own, bfloat16. Token j of request r is row slots[r * s_k + j] of k, k_rope and v.
struct OwnKeysProblem {
  const void* q;  ///< (b * s_q, h_q, d_k + d_rope)
  const void* k;  ///< d_k columns a head
  std::int64_t k_row, k_head;
  const void* k_rope;  ///< d_rope columns that all heads share
  std::int64_t k_rope_row;
  const void* v;  ///< d_v columns a head
  std::int64_t v_row, v_head;
  const std::int32_t* slots;
  int s_q, s_k, h_q, h_kv, d_k, d_rope, d_v;
  bool causal;
  float scale;
};

/// Some rows in fp32, as plainly as possible. `scores`: count * s_k floats of scratch; `out`: (count, d_v) float32.
void reference_own_keys(const OwnKeysProblem& problem, const OutputRow* rows, int count, float* scores,
                        float* out, cudaStream_t stream);

}  // namespace flash_mla::bench::gpu
