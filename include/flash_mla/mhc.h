#pragma once

#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// Streams of a residual at most.
inline constexpr int kMaxMhcStreams = 8;

/// Manifold-constrained hyper-connections (Xie et al., arXiv 2512.24880), as DeepSeek V4 has them: the residual of a token is n
/// streams of d elements. Before a layer they are weighed and added up to the layer's input, behind it they are mixed with each
/// other and the layer's output is added to each. The weights depend on the token.
///
/// With f = flat(residual), n * d elements: mixes = fn f / sqrt(mean(f^2) + rms_eps), each times its scale, plus its base. Of
/// these the first n give pre = sigmoid + pre_eps, the next n post = sigmoid * post_mult, and the others, n x n, comb: a softmax
/// of every row + sinkhorn_eps, columns divided by their sum + sinkhorn_eps, and then sinkhorn_repeat - 1 times rows and columns.
struct MhcWeights {
  TensorView fn;     ///< (n * (n + 2), n * d) float32, last dimension contiguous
  TensorView scale;  ///< (3) float32: of pre, of post, of comb
  TensorView base;   ///< (n * (n + 2)) float32
  /// Optional, (d) float32 or the residual's dtype: the layer's own RMSNorm, of its input as it was rounded.
  TensorView norm{};
};

struct MhcOptions {
  float rms_eps = 1e-6f;
  float pre_eps = 1e-6f;
  float post_mult = 2.0f;
  float sinkhorn_eps = 1e-6f;
  int sinkhorn_repeat = 20;  ///< 1 to 1000
  float norm_eps = 1e-6f;    ///< of MhcWeights::norm
  int num_threads = 0;       ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;    ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// What a layer is given, and what is needed behind it.
struct MhcMixes {
  TensorView post;         ///< (tokens, n) float32
  TensorView comb;         ///< (tokens, n, n) float32: [from, to]
  TensorView layer_input;  ///< (tokens, d), the residual's dtype, last dimension contiguous
};

/// layer_input = sum over s of pre[s] * residual[s], and the token's post and comb, all of which are written. residual: (tokens,
/// n, d) float32 | float16 | bfloat16, last dimension contiguous. Sums are float32 in an order that depends on shapes, dtype and
/// alignment alone, results are rounded once. On a GPU (made for bfloat16, 4 streams and d a multiple of 256) the work is queued on
/// options.stream and may be captured; nothing is allocated. Throws InvalidArgument (argument, value, what was expected) or
/// Unsupported.
FLASH_MLA_API void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
                           const MhcOptions& options = {});

/// out[t] = post[t] * x + sum over s of comb[s][t] * residual[s], for the streams t. x: (tokens, d), the layer's output; out:
/// (tokens, n, d), may be residual; one dtype. post and comb: (tokens, n), (tokens, n, n) float32, as mhc_pre writes them.
FLASH_MLA_API void mhc_post(const TensorView& x, const TensorView& residual, const TensorView& post,
                            const TensorView& comb, const TensorView& out, const MhcOptions& options = {});

/// mhc_post, and mhc_pre of what it wrote to `out`, in one pass, with the bits of the two. `post` and `comb` are those of the layer
/// that gave x; `mixes`, the next layer's, are written and may lie in the same memory.
FLASH_MLA_API void mhc_post_pre(const TensorView& x, const TensorView& residual, const TensorView& post,
                                const TensorView& comb, const TensorView& out, const MhcWeights& weights,
                                const MhcMixes& mixes, const MhcOptions& options = {});

namespace reference {

/// By the definition, every sum in float64; mixes and out are float64, as any other tensor may be. For verification.
FLASH_MLA_API void mhc_pre(const TensorView& residual, const MhcWeights& weights, const MhcMixes& mixes,
                           const MhcOptions& options = {});
FLASH_MLA_API void mhc_post(const TensorView& x, const TensorView& residual, const TensorView& post,
                            const TensorView& comb, const TensorView& out, const MhcOptions& options = {});

}  // namespace reference
}  // namespace flash_mla
