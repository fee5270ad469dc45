#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/matrix.h"

namespace flash_mla::sm90 {

// Kernels that work on the rows of bfloat16 matrices, one token each. All are queued on `stream`, allocate
// nothing and may be captured in a CUDA graph. Pointers are the device's.

/// What the rotations of a step need: cosines and sines (tokens, pairs), pair i of token t turned by
/// positions[t] * inv_freq[i] and multiplied by `scale`.
struct RotationTable {
  float* cosines = nullptr;
  float* sines = nullptr;
  const float* inv_freq = nullptr;
  float scale = 1.0f;
  int pairs = 0;
};

/// out[t] = table[ids[t]], where a negative id is tokens[-1 - id], and the first row if that is negative too;
/// and the step's rotations.
void embed(const std::byte* table, const std::int32_t* ids, const std::int32_t* tokens,
           const std::int32_t* positions, const RotationTable& rotations, Matrix out, cudaStream_t stream);

/// out = x / sqrt(mean(x²) + eps) * weight
void rms_norm(Matrix x, const float* weight, float eps, Matrix out, cudaStream_t stream);

/// out = silu(gate) * up, where gate_up = [gate | up]
void silu_mul(Matrix gate_up, Matrix out, cudaStream_t stream);

/// Rotates the rope part of every head of q (tokens, heads * (nope + rope)) in place; normalises the latent in
/// kv (tokens, rank + rope), rotates its rope part and writes both to the token's slot of the cache. A slot of
/// -1 is not written; without slots it is the token's row.
struct RopeAndAppend {
  Matrix q, kv;
  const float* kv_norm = nullptr;
  float eps = 0;
  const std::int64_t* slots = nullptr;  ///< or null
  RotationTable rotations;
  std::byte* cache = nullptr;
  int heads = 0, nope = 0, rope = 0, rank = 0;
};
void rope_and_append(const RopeAndAppend& args, cudaStream_t stream);

/// out[i] = x[rows[i]]
void gather(Matrix x, const std::int32_t* rows, Matrix out, cudaStream_t stream);

/// inout[t] += bias; with `replace`, inout[t] = bias.
void add_bias(const float* bias, bool replace, Matrix inout, cudaStream_t stream);

/// tokens[i]: column of the largest value of row i of x (float32, dense), the first among equals; -1 where
/// one is NaN or +inf, or all are -inf. `scratch`: likeliest_scratch_bytes(rows), zeroed before its first
/// use.
void likeliest(Matrix x, std::int32_t* tokens, std::byte* scratch, cudaStream_t stream);
std::size_t likeliest_scratch_bytes(std::int64_t rows);

/// Keys of the sequences of a step, gathered from the pages of a cache to latents (num_keys, rank) and k_rope
/// (num_keys, rope), sequence after sequence: `starts` (num_seqs + 1) their first keys, `tables` (num_seqs)
/// where in `pages` their pages begin.
struct GatherKeys {
  const std::byte* cache = nullptr;
  const std::int32_t* starts = nullptr;
  const std::int32_t* tables = nullptr;
  const std::int32_t* pages = nullptr;
  int num_seqs = 0;
  std::int64_t num_keys = 0;
  int rank = 0, rope = 0;
  std::byte* latents = nullptr;
  std::byte* k_rope = nullptr;
};
void gather_keys(const GatherKeys& args, cudaStream_t stream);

/// Independent normal-like values of the given standard deviation, a function of seed and index alone.
/// bfloat16 or float32.
void fill_random(std::byte* out, DType dtype, std::int64_t count, std::uint64_t seed, float deviation,
                 cudaStream_t stream);

}  // namespace flash_mla::sm90
