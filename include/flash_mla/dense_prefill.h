#pragma once

#include <cstddef>
#include <optional>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// The tensors of one dense MLA prefill call, in the form that is not absorbed: every head has keys and values of its
/// own, made from the latents, and the keys' rotary part is shared by all heads. Sequences of different lengths lie end
/// to end. All of them live on one CUDA device. Last dimensions are contiguous, other strides are multiples of 8
/// elements, and data is aligned to 16 bytes: k_nope and v may be halves of one tensor, k_nope and k_rope columns of
/// another.
struct DensePrefillArgs {
  TensorView q;  ///< (total_q, num_heads, 192) float16 | bfloat16: 128 columns, then 64 of the rotary part
  TensorView k_nope;  ///< (total_k, num_heads, 128), q's dtype
  TensorView k_rope;  ///< (total_k, 64), q's dtype
  TensorView v;       ///< (total_k, num_heads, 128), q's dtype
  /// (num_seqs + 1) int32, contiguous, not decreasing: sequence i has queries cu_seqlens_q[i] to
  /// cu_seqlens_q[i + 1] - 1, and keys likewise. Either may be empty.
  TensorView cu_seqlens_q, cu_seqlens_k;
  TensorView out;    ///< (total_q, num_heads, 128), q's dtype; written, but for rows outside all sequences
  TensorView lse{};  ///< (num_heads, total_q) float32, natural log; written. Optional
};

struct DensePrefillOptions {
  /// Factor on q·k before the softmax. Default 192 ** -0.5; see DenseDecodeOptions.
  std::optional<float> softmax_scale = std::nullopt;
  /// Bottom-right aligned: query i of a sequence sees keys j <= seqlen_k - seqlen_q + i.
  bool causal = false;
  /// The cudaStream_t to launch on.
  void* stream = nullptr;
};

/// Bytes of scratch memory a call needs on the tensors' device, 64-byte aligned: the same for every call. Throws
/// Unsupported in a build without CUDA.
FLASH_MLA_API std::size_t dense_prefill_workspace_size();

/// out = softmax(scale * (q_nope · k_nope^T + q_rope · k_rope^T)) · v per sequence and head, on a Hopper GPU; there is no
/// other backend. A row that sees no key gives out = 0 and lse = +inf. The same inputs give the same bits, and a
/// sequence's do not depend on the others.
///
/// Queued on options.stream; never allocates, never synchronises, and may be captured in a CUDA graph, whose replays take
/// the lengths then in cu_seqlens_q and cu_seqlens_k. Lengths are the caller's to get right. Throws InvalidArgument
/// (message: argument, value, what was expected) or Unsupported.
FLASH_MLA_API void dense_prefill(const DensePrefillArgs& args, void* workspace, std::size_t workspace_bytes,
                                 const DensePrefillOptions& options = {});

}  // namespace flash_mla
