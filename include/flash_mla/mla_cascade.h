#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/schedule.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

// Latent attention of requests that share a prefix. Over the prefix it is computed in the form that is not absorbed, over keys
// and values of every head that are made once for all requests: 2 (d_nope + d_rope + d_v) operations for a query, head and key
// where the absorbed form takes 2 (2 rank + d_rope), 640 instead of 2,176 for DeepSeek-V3, and the keys are read once for all
// requests. Over what each request has of its own it is absorbed, over the latents in its pages. The idea is TyphoonMLA's
// (arXiv 2509.21081).
//
// kv_b is the model's kv_b_proj.weight as (h, d_nope + d_v, rank): of every head W_UK, d_nope rows, and W_UV behind it. In
// DeepSeek-V3 d_nope is 128, d_rope 64, d_v 128, the rank 512.

/// Latents of a prefix to keys and values of every head:
///
///   k[j, h] = [W_UK[h] · latent[j] | rope[j]],  v[j, h] = W_UV[h] · latent[j]
struct ExpandArgs {
  TensorView k_cache;  ///< (num_blocks, page_size, 1, rank + d_rope) float32 | float16 | bfloat16
  TensorView pages;    ///< (n) int32: page of the prefix's n-th page_size tokens
  TensorView kv_b;     ///< (h, d_nope + d_v, rank), k_cache's dtype
  TensorView k;        ///< (num_tokens, h, d_nope + d_rope), k_cache's dtype; written
  TensorView v;        ///< (num_tokens, h, d_v), k_cache's dtype; written
};

/// Expands the first k.shape[0] tokens of `pages`; once for a prefix and layer. On the CPU, on num_threads threads (0: as many
/// as OpenMP would use). Sums are fp32. Throws InvalidArgument (message: argument, value, what was expected) or Unsupported;
/// everything is checked before anything is written.
FLASH_MLA_API void expand_latents(const ExpandArgs& args, int num_threads = 0);

struct MlaCascadeArgs {
  TensorView q;  ///< (b, s_q, h, d_nope + d_rope) float32 | float16 | bfloat16, rotated, not absorbed
  TensorView prefix_k, prefix_v;  ///< of expand_latents: (n, h, d_nope + d_rope) and (n, h, d_v), q's dtype
  TensorView kv_b;                ///< (h, d_nope + d_v, rank), q's dtype
  TensorView k_cache;             ///< (num_blocks, page_size, 1, rank + d_rope), q's dtype
  TensorView block_table;         ///< (b, max_blocks) int32: pages of what each request has behind the prefix
  TensorView cache_seqlens;       ///< (b) int32: tokens of that
  TensorView out;                 ///< (b, s_q, h, d_v), q's dtype; written. W_UV has been applied
  TensorView lse{};  ///< (b, h, s_q) float32, natural log of the softmax denominator; written. Optional
};

struct MlaCascadeOptions {
  /// Factor on q·k before the softmax. Default (d_nope + d_rope) ** -0.5; see DenseDecodeOptions.
  std::optional<float> softmax_scale = std::nullopt;
  /// Query i sees of what its request has of its own the tokens j <= length - s_q + i; lengths are then at least s_q. The
  /// prefix is seen whole. Without effect when s_q == 1.
  bool causal = false;
  int num_threads = 0;  ///< threads to run on; 0 means as many as OpenMP would use
};

/// Bytes of scratch memory mla_cascade needs for this problem, 64-byte aligned. Throws as it does for shapes that do not fit
/// together.
FLASH_MLA_API std::size_t mla_cascade_workspace_size(const MlaCascadeArgs& args,
                                                     const DecodeScheduleView& schedule,
                                                     const MlaCascadeOptions& options = {});

/// Attention of every request over the prefix and what it has of its own behind it, merged by their log-sum-exps: what
/// dense_decode over the whole context gives, W_UV applied to it. `schedule` is of cache_seqlens. Absorbed queries and both
/// halves' results are rounded to q's dtype in between, as a model that calls the halves itself rounds them.
///
/// On the CPU. A thread's first call allocates its scratch memory for products. Everything is checked before anything is
/// written. Throws InvalidArgument (message: argument, value, what was expected), Unsupported for tensors of a GPU.
FLASH_MLA_API void mla_cascade(const MlaCascadeArgs& args, const DecodeScheduleView& schedule,
                               void* workspace, std::size_t workspace_bytes,
                               const MlaCascadeOptions& options = {});

}  // namespace flash_mla
