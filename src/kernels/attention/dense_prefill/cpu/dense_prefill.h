#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/matrix.h"
#include "kernels/gemm/cpu/gemm.h"
#include "kv/format.h"

namespace flash_mla::cpu {

/// Un-absorbed attention of one sequence's new tokens, causal from position seq_len - num_tokens on:
///
///   k[j, h] = [latent[j] · W_UK[h] | k_rope[j]],  v[j, h] = latent[j] · W_UV[h]^T
///   out[i, h] = softmax(scale * q[i, h] · k[:, h]^T) · v[:, h]
struct DensePrefill {
  int heads = 0, nope = 0, rope = 0, v = 0, rank = 0;
  float scale = 1.0f;
  Matrix q;                             ///< (num_tokens, heads * (nope + rope)), rotated
  Matrix out;                           ///< (num_tokens, heads * v), of q's dtype
  const std::byte* cache = nullptr;     ///< (pages, kPageSize, rank + rope), of q's dtype; or null and
  const kv::Pool* pool = nullptr;       ///< a cache in another type, whose pages have kPageSize tokens
  std::span<const std::int32_t> pages;  ///< of the sequence, at least ceil(seq_len / kPageSize)
  std::int64_t seq_len = 0;             ///< tokens in the cache, the new ones counted in
  const PackedWeight* kv_b = nullptr;   ///< (heads * (nope + v), rank)
  int num_threads = 1;
  bool batch_invariant = false;  ///< see GemmMode
};
void dense_prefill(Gemm& gemm, const DensePrefill& args);

}  // namespace flash_mla::cpu
