#pragma once

#include "kernels/gemm/cpu/gemm.h"
#include "model/ops.h"

namespace flash_mla::model {

/// Un-absorbed attention of one sequence's new tokens, causal from position seq_len - num_tokens on:
///
///   k[j, h] = [latent[j] · W_UK[h] | k_rope[j]],  v[j, h] = latent[j] · W_UV[h]^T
///   out[i, h] = softmax(scale * q[i, h] · k[:, h]^T) · v[:, h]
///
/// q (num_tokens, heads * (nope + rope)) rotated; `cache` is one layer's (pages, kPageSize, rank + rope);
/// `kv_b` (heads * (nope + v), rank); out (num_tokens, heads * v).
void prefill_attention(const checkpoint::ModelConfig& config, Gemm& gemm, int num_threads,
                       bool batch_invariant, const Chunk& chunk, const Matrix& q, const Buffer& cache,
                       const PackedWeight& kv_b, const Matrix& out);

}  // namespace flash_mla::model
