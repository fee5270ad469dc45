#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/matrix.h"

namespace flash_mla::sm90 {

// Attention for head dimensions that the Hopper kernels do not have: one block per query and head, correct
// for every shape, and slow. Sums are fp32 and taken in an order that depends on the query's keys alone.

/// Decode attention: every row of q is a request of its own over the paged cache (pages, kPageSize,
/// rank + rope).
struct PlainDecode {
  Matrix q, out;
  const std::byte* cache = nullptr;
  const std::int32_t* lens = nullptr;   ///< (rows)
  const std::int32_t* table = nullptr;  ///< (rows, max_blocks)
  std::int64_t max_blocks = 0;
  int heads = 0, rank = 0, rope = 0;
  float scale = 1.0f;
};
void plain_decode(const PlainDecode& args, cudaStream_t stream);

/// Causal attention over sequences laid end to end. expanded (keys, heads * (nope + v)): key and value of
/// every head; k_rope (keys, rope) for all heads; starts (num_seqs + 1) of queries and keys.
struct PlainPrefill {
  Matrix q, out;
  const std::byte* expanded = nullptr;
  const std::byte* k_rope = nullptr;
  const std::int32_t* query_starts = nullptr;
  const std::int32_t* key_starts = nullptr;
  int num_seqs = 0;
  int heads = 0, nope = 0, rope = 0, v = 0;
  float scale = 1.0f;
};
void plain_prefill(const PlainPrefill& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
