#pragma once

#include <cstddef>
#include <optional>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// A cache and, for every query token, the list of its tokens that are attended to.
struct SparseKeys {
  KvCacheView cache;
  /// (b, s_q, topk) int32, last dimension contiguous: slots (page * page_size + offset) in any order. -1 is
  /// no token; it may stand anywhere. A slot that stands twice counts twice. Any topk, 0 included; multiples
  /// of 64 are fastest.
  TensorView indices;
  /// Optional, (b) int32, 0 to topk: only so many entries of the lists of a request are looked at; the others
  /// may hold anything.
  TensorView topk_length{};
  bool defined() const { return cache.defined(); }
};

/// The tensors of one token-sparse MLA decode call: b requests, s_q query tokens each, h_q query heads that
/// share one latent. All of them live on one device.
struct SparseDecodeArgs {
  TensorView q;        ///< (b, s_q, h_q, d_qk) bfloat16 | float16; d_qk 576 or 512. Last dimension contiguous
  SparseKeys keys;     ///< a kBFloat16 or kFloat16 cache has q's dtype; d_qk is q's
  SparseKeys extra{};  ///< optional second cache in the same softmax; its own format, page size, lists
  TensorView attn_sink{};  ///< optional, (h_q) float32, natural log: a weight exp(sink) in out's denominator
  TensorView out;          ///< (b, s_q, h_q, 512), q's dtype; written
  TensorView lse{};        ///< optional, (b, h_q, s_q) float32, natural log; written
};

struct SparseDecodeOptions {
  /// Factor on q·k before the softmax; default d_qk ** -0.5. See DenseDecodeOptions.
  std::optional<float> softmax_scale = std::nullopt;
  /// 0: lists are cut into splits wherever the balance wants it. > 0: batch-invariant mode, a list is cut at
  /// multiples of this many blocks of 64 entries (keys first, then extra, which begins a block) and nowhere
  /// else, so that a row's bits depend on its own list alone.
  int fixed_split_blocks = 0;
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// Bytes of scratch memory sparse_decode needs, on the tensors' device, 64-byte aligned. Depends on shapes,
/// formats and options alone, never on the number of tokens in a cache; no device data is read. Throws as
/// sparse_decode does for shapes that do not fit together.
FLASH_MLA_API std::size_t sparse_decode_workspace_size(const SparseDecodeArgs& args,
                                                       const SparseDecodeOptions& options = {});

/// Attention of every query token over the tokens on its lists, S (those of `keys` and of `extra` together):
///
///   out[i] = sum_{j in S} exp(scale * q[i]·K[j]) * V[j] / (sum_{j in S} exp(scale * q[i]·K[j]) + exp(sink)),
///   lse[i] = log sum_{j in S} exp(scale * q[i]·K[j])
///
/// with V = K[:512], over the dequantised caches (float32 scales, applied in float32); accumulates in fp32.
/// There is no causal flag: the list is the mask. The contracts, beyond those of dense_decode:
///   - an entry of -1, an entry at or past topk_length, and a byte of a cache that is not selected, though it
///     hold NaN, never reach a result;
///   - S empty: out = 0, lse = +inf, whatever the sink;
///   - the sink changes out, not lse. +inf: out = 0; -inf or no attn_sink: no effect;
///   - the order of a list changes nothing but rounding, and the same inputs give the same bits.
///
/// The plan (which worker takes which part of which list) is made inside the call, on the tensors' device,
/// from shapes and topk_length; it allocates nothing and synchronises with nothing, so that a CUDA graph may
/// capture it and be replayed over refilled lists and lengths. `workspace` holds at least
/// sparse_decode_workspace_size bytes; it need not be initialised and is garbage afterwards.
///
/// On the host every argument is checked before anything is written: indices outside the pool (anything but
/// -1 and 0 to num_pages * page_size - 1) and lengths outside 0 to topk as well. Throws InvalidArgument
/// (message: argument, value, what was expected) or Unsupported. On a GPU shapes, dtypes, strides and devices
/// are checked; values are the caller's to get right. The sm90 backend takes caches aligned to 16 bytes with
/// strides of pages and tokens that are multiples of 16 bytes; caches of two formats, or of kFp8Tensor with two
/// scales, are decoded one after the other and merged in float32.
FLASH_MLA_API void sparse_decode(const SparseDecodeArgs& args, void* workspace, std::size_t workspace_bytes,
                                 const SparseDecodeOptions& options = {});

/// The tensors of one token-sparse prefill: n query tokens of one or more requests, one after the other.
///
/// An entry of a list names a token in one of three ways:
///   - neither cu_seqlens_q nor block_table: a slot of `cache`, as FlashMLA has it;
///   - cu_seqlens_q and cu_seqlens_k: a position in the request, whose tokens lie one after the other in the
///     slots cu_seqlens_k[r] to cu_seqlens_k[r + 1] - 1;
///   - cu_seqlens_q, block_table and cache_seqlens: a position in the request, in slot
///     block_table[r][position / page_size] * page_size + position % page_size.
/// An entry that is negative, or not below the number of slots, of the request's tokens or of
/// cache_seqlens[r], is no token and legal.
struct SparsePrefillArgs {
  TensorView q;        ///< (n, h_q, d_qk) bfloat16 | float16; d_qk 576 or 512. Last dimension contiguous
  KvCacheView cache;   ///< any format of q's d_qk, read directly; flat tokens are one page of s_kv
  TensorView indices;  ///< (n, topk) int32, last dimension contiguous; duplicates count twice
  TensorView topk_length{};    ///< optional, (n) int32, 0 to topk: entries of each list that are looked at
  TensorView attn_sink{};      ///< optional, (h_q) float32, as in decode
  TensorView cu_seqlens_q{};   ///< optional, (b + 1) int32, 0 to n: where each request's queries begin
  TensorView cu_seqlens_k{};   ///< optional, (b + 1) int32: slot where each request's tokens begin
  TensorView block_table{};    ///< optional, (b, max_blocks) int32, last dimension contiguous
  TensorView cache_seqlens{};  ///< with block_table: (b) int32, tokens of each request
  TensorView out;              ///< (n, h_q, 512), q's dtype; written
  TensorView max_logits{};  ///< optional, (n, h_q) float32: the largest scaled score; -inf where S is empty
  TensorView lse{};         ///< optional, (n, h_q) float32, natural log; +inf where S is empty
};

struct SparsePrefillOptions {
  std::optional<float> softmax_scale = std::nullopt;  ///< default d_qk ** -0.5
  int num_threads = 0;                                ///< CPU: 0 means as many as OpenMP would use
  void* stream = nullptr;                             ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// As sparse_decode_workspace_size. No workspace grows with the number of tokens in the cache.
FLASH_MLA_API std::size_t sparse_prefill_workspace_size(const SparsePrefillArgs& args,
                                                        const SparsePrefillOptions& options = {});

/// sparse_decode's attention for many query tokens at once; max_logits and lse ignore the sink. Every row's
/// bits depend on its own query and list alone. Contracts, checks and errors of sparse_decode, except that
/// entries outside the tokens there are count as none. On the host cu_seqlens, block_table and cache_seqlens
/// are checked too (block_table only where an entry uses it). The sm90 backend takes every format and needs no
/// workspace; caches, q and out are aligned to 16 bytes, with strides that are multiples of 16 bytes.
FLASH_MLA_API void sparse_prefill(const SparsePrefillArgs& args, void* workspace, std::size_t workspace_bytes,
                                  const SparsePrefillOptions& options = {});

namespace reference {

/// sparse_decode and sparse_prefill by the definition: one thread, every sum in float64, over the cache
/// dequantised without rounding (e4m3 times its scale in float64). For verification, not for speed. `out`,
/// `lse` and `max_logits` may each be float32 or float64 (or `out` q's dtype), so that a comparison sees the
/// unrounded value.
FLASH_MLA_API void sparse_decode(const SparseDecodeArgs& args, const SparseDecodeOptions& options = {});
FLASH_MLA_API void sparse_prefill(const SparsePrefillArgs& args, const SparsePrefillOptions& options = {});

}  // namespace reference
}  // namespace flash_mla
