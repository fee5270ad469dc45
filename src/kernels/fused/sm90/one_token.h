#pragma once

// All layers of a model for one token, or a few of one sequence, in one kernel: what a decode step at batch 1 takes,
// and one that checks drafts. docs/cuda-engine.md.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "base/routing.h"

namespace flash_mla::sm90 {

/// A layer's weights, bfloat16 but for norms and router (float32), dense, aligned to 16 bytes; and its cache.
struct OneTokenLayer {
  const void* qkv = nullptr;   ///< (heads * (nope + 64) + 576, hidden): queries, latent, key
  const void* w_uk = nullptr;  ///< (heads, 512, nope)
  const void* w_uv = nullptr;  ///< (heads, v, 512)
  const void* o = nullptr;     ///< (hidden, heads * v)
  const float* input_norm = nullptr;
  const float* post_attention_norm = nullptr;
  const float* kv_norm = nullptr;
  void* cache = nullptr;  ///< (pages, 64, 576)

  const float* router = nullptr;      ///< (num_experts, hidden); null: a dense layer
  const float* correction = nullptr;  ///< (num_experts) or null
  /// Experts, the shared ones last: (experts, 2 * moe_intermediate, hidden) and (experts, hidden,
  /// moe_intermediate). Of a dense layer (2 * intermediate, hidden) and (hidden, intermediate).
  const void* gate_up = nullptr;
  const void* down = nullptr;
  /// out (num_tokens, experts_per_token + shared): the experts that were chosen
  std::int32_t* ids = nullptr;
};

inline constexpr int kMaxOneTokenLayers = 64;
inline constexpr int kMaxOneTokens = 4;                        ///< of a sequence
inline constexpr int kOneTokenRank = 512, kOneTokenRope = 64;  ///< of the cache's rows

struct OneToken {
  int num_tokens = 1;  ///< one behind the other in their sequence; 1 to kMaxOneTokens
  int num_layers = 0, hidden = 0, heads = 0, nope = 0, v = 0;
  int moe_intermediate = 0, intermediate = 0;  ///< of an expert, and of a dense layer
  Routing routing;                             ///< of mixture layers
  float eps = 0, latent_eps = 0, softmax_scale = 0;

  const float* cosines = nullptr;  ///< (num_tokens, 32), of the tokens' positions
  const float* sines = nullptr;    ///< (num_tokens, 32)
  /// (num_tokens): where their keys go, page * 64 + offset: the first's that of key len - 1
  const std::int64_t* slot = nullptr;
  /// Keys that the first token sees, its own included; at least 1. Each of the others sees one more.
  const std::int32_t* len = nullptr;
  const std::int32_t* table = nullptr;  ///< pages of the sequence
  void* x = nullptr;  ///< inout (num_tokens, hidden) bfloat16: embeddings, then the last layer's output
  void* workspace = nullptr;  ///< one_token_workspace_size(), aligned to 256, zeroed before its first use
  OneTokenLayer layers[kMaxOneTokenLayers];
};

/// Whether one_token() takes a model of these sizes on this device; pointers and constants are not looked at.
/// At most 16 heads, a nope of 32, 64 or 128, hidden sizes, heads * v and the experts' intermediate size at
/// most 2048, all divisible by 8. `dense`, `mixture`: whether the model has such layers.
bool fits_one_token(const OneToken& sizes, bool dense, bool mixture);

/// Same for all models that fit.
std::size_t one_token_workspace_size();

/// Queues the kernel: one CTA on every multiprocessor, all resident at a time (cooperative launch), which
/// wait for each other. May be captured in a CUDA graph. The same input gives the same bits, whether tokens come one
/// by one or together. Launches that share a workspace must follow one another.
cudaError_t one_token(const OneToken& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
