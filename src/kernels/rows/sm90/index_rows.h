#pragma once

#include <cuda_runtime_api.h>

#include "base/matrix.h"

namespace flash_mla::sm90 {

// What is done to the rows of an indexer before they are quantised. Both are queued on `stream`, allocate nothing and
// may be captured in a CUDA graph; a row's bits are its own. Rotations are those of the step (rows.h): cosines and
// sines (rows, pairs), which turn the first `pairs` pairs of neighbours of a head.

struct IndexRotation {
  const float* cosines = nullptr;
  const float* sines = nullptr;
  int pairs = 0;  ///< at most half a head
};

/// k[t] = (k[t] - mean) / sqrt(variance + eps) * weight + bias, rounded, then turned; k (tokens, dim) bfloat16 in place,
/// dim 64 or 128, rows aligned to 8 bytes.
void norm_and_rotate_index_keys(Matrix k, const float* weight, const float* bias, float eps,
                                const IndexRotation& rotation, cudaStream_t stream);

/// Turns every head of q (tokens, heads * dim) bfloat16 in place, rows aligned to 4 bytes.
void rotate_index_queries(Matrix q, int dim, const IndexRotation& rotation, cudaStream_t stream);

}  // namespace flash_mla::sm90
