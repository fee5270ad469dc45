#pragma once

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// Base of the logarithm in a log-sum-exp tensor: kE for this library and FlashAttention, kTwo for
/// FlashInfer.
enum class LseBase { kE, kTwo };

/// Merges the attention of the same queries over two disjoint sets of keys:
///
///   lse = log(exp(lse_a) + exp(lse_b)),   out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)
///
/// (log and exp in `base`). Associative up to rounding; use it for splits, cascade (shared prefix) and
/// context parallelism. A state without keys has lse +inf (this library) or -inf (FlashInfer); it
/// contributes nothing whatever its `out` holds. Two empty states give out = 0, lse = +inf.
///
/// Shapes: out_a, out_b, out (b, s_q, h_q, d) float32 | float16 | bfloat16, one dtype;
/// lse_a, lse_b, lse (b, h_q, s_q) float32. Strides are free but for the last dimension of out_a, out_b and out,
/// which is contiguous: a (tokens, heads) layout is a permuted view. `out`/`lse` may be out_a/lse_a or
/// out_b/lse_b themselves (in place).
///
/// Tensors of the CPU, or of one CUDA device: there the work is queued on `stream`, a cudaStream_t, and may be
/// captured. Never allocates and never synchronises. Throws InvalidArgument, and Unsupported for a device
/// that no backend runs on.
FLASH_MLA_API void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                                const TensorView& lse_b, const TensorView& out, const TensorView& lse,
                                LseBase base = LseBase::kE, void* stream = nullptr);

/// merge_states of (out, lse) and (other_out, other_lse) into out and lse. mask: optional, (b, s_q) uint8, on the CPU: rows
/// where it is 0 stay as they are.
FLASH_MLA_API void merge_states_in_place(const TensorView& out, const TensorView& lse,
                                         const TensorView& other_out, const TensorView& other_lse,
                                         const TensorView& mask = {}, LseBase base = LseBase::kE,
                                         void* stream = nullptr);

}  // namespace flash_mla
