#pragma once

// Attention of a prefill chunk in MLA's un-absorbed form, on Hopper: every head has keys and values of its
// own, made from the latents by one product with kv_b; the keys' rope part is shared by all heads. Free of
// CUDA headers. Implemented by dense_prefill.cpp, or by not_built.cpp in a build without CUDA.

#include <cstddef>
#include <cstdint>

#include "flash_mla/dense_prefill.h"
#include "flash_mla/export.h"

namespace flash_mla::sm90 {

inline constexpr int kPrefillHeadDimNope = 128;
inline constexpr int kPrefillHeadDimRope = 64;
inline constexpr int kPrefillHeadDim = kPrefillHeadDimNope + kPrefillHeadDimRope;
inline constexpr int kPrefillHeadDimV = 128;

/// The lengths are read by the kernel alone and trusted: the first is >= 0, the last at most total_q (total_k).
using flash_mla::DensePrefillArgs;

/// Bytes of device memory a call works in; they need not be initialised. Two calls that may run at the same
/// time need one each. Depends on nothing but this library's version, so that one query serves all calls.
FLASH_MLA_API std::size_t dense_prefill_workspace_size();

/// Throws Unsupported or InvalidArgument, naming the argument, for shapes, strides, dtypes and devices that
/// the kernel does not take, before anything is launched.
void check_supported(const DensePrefillArgs& args);

/// out = softmax(softmax_scale * (q_nope k_nope^T + q_rope k_rope^T)) v per sequence and head.
///
/// causal: the last query of a sequence is aligned to its last key (a chunk behind a prefix has
/// seqlen_k > seqlen_q, and the prefix's keys are in k_nope, k_rope and v too): query i of seqlen_q sees keys
/// j <= seqlen_k - seqlen_q + i. Unlike in decode, a single query is no exception: it sees all keys anyway.
///
/// A row that sees no key gives out = 0 and lse = +inf; a row with a NaN among its scores, or whose scores
/// are all -inf, is NaN in both. What other sequences hold, NaN included, never reaches a result.
///
/// softmax_scale: positive and finite. workspace: dense_prefill_workspace_size() bytes, aligned to 16.
/// stream: a cudaStream_t. Calls check_supported; allocates nothing, does not synchronise, reads nothing
/// back, and can be captured in a CUDA graph, whose replays take the lengths then in cu_seqlens_q and
/// cu_seqlens_k. Deterministic: the same inputs give the same bits, and a sequence's bits do not depend on
/// the others.
FLASH_MLA_API void dense_prefill(const DensePrefillArgs& args, float softmax_scale, bool causal,
                                 void* workspace, void* stream);

}  // namespace flash_mla::sm90
