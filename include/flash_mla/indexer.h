#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/quantise.h"
#include "flash_mla/tensor.h"
#include "flash_mla/top_k.h"

namespace flash_mla {

// The lightning indexer of DeepSeek sparse attention. It scores every earlier token for a query token,
//
//   logit[i][j] = scale[j] * sum_h weights[i][h] * max(q[i][h] · k[j], 0),
//
// and attention is over the tokens with the largest scores (top_k.h). Queries and keys are e4m3; a query's scale
// and every constant factor are part of its weights.
//
// A cache of index keys is (num_pages, page_size, 1, D + 4) uint8: each page holds page_size rows of D e4m3, then
// page_size float32 scales. The dimensions within a page are contiguous; pages are any distance apart that is a
// multiple of 4 bytes. D is 64 or 128, so that a token has 68 or 132 bytes.

/// What the indexer's operations share.
struct IndexerOptions {
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// New keys for a cache of index keys.
struct IndexKeyAppendArgs {
  TensorView k;             ///< (n, D) bfloat16 | float16 | float32, last dimension contiguous
  TensorView slot_mapping;  ///< (n) int64 | int32: slot (page * page_size + offset) of each key; -1: skipped
  TensorView cache;         ///< written at those slots, and nowhere else
  Fp8Recipe recipe =
      Fp8Recipe::kIndexerPow2;  ///< kIndexerPow2 (scale_fmt ue8m0) or kIndexer; a tile is a key
  bool rotate = true;           ///< a Hadamard rotation first, see below
};

/// Quantises keys into a cache, bit for bit those of the recipe on every backend. `rotate` multiplies by the
/// Hadamard matrix in its natural (Sylvester) order, times D ** -0.5: sums in float32, rounded to k's dtype.
/// Rotated by both, queries and keys have the products that they had, and smaller extremes. Two keys with one
/// slot: one of them, unspecified which, is there afterwards. Allocates nothing; slots outside the pool are
/// refused on the host before anything is written. Throws InvalidArgument or Unsupported.
FLASH_MLA_API void append_index_keys(const IndexKeyAppendArgs& args, const IndexerOptions& options = {});

/// Queries of the indexer as the model has them, to be quantised.
struct IndexQueryArgs {
  TensorView q;         ///< (m, H, D) bfloat16 | float16 | float32; the last two dimensions contiguous
  TensorView weights;   ///< (m, H) float32, last dimension contiguous
  float factor = 1.0f;  ///< DeepSeek: H ** -0.5 * D ** -0.5
  Fp8Recipe recipe = Fp8Recipe::kIndexerPow2;  ///< kIndexerPow2, kIndexer or kVllmIndexer; a tile is a head
  bool rotate = true;                          ///< as in append_index_keys
  TensorView values;  ///< (m, H, D) uint8, e4m3, the last two dimensions contiguous; written
  TensorView
      scaled_weights;  ///< (m, H) float32, last dimension contiguous: weights * factor * scale; written
};

/// As append_index_keys.
FLASH_MLA_API void quantise_index_queries(const IndexQueryArgs& args, const IndexerOptions& options = {});

/// Scores of m query tokens over keys that lie one after the other.
struct MqaLogitsArgs {
  TensorView q;        ///< (m, H, D) uint8, e4m3; H 1 to 128, D 64 or 128; the last two dimensions contiguous
  TensorView weights;  ///< (m, H) float32, last dimension contiguous
  TensorView k;        ///< (n, D) uint8, e4m3, last dimension contiguous
  TensorView k_scales;   ///< (n) float32, contiguous
  TensorView key_begin;  ///< (m) int32: row i scores the keys key_begin[i] to key_end[i] - 1; none is legal
  TensorView key_end;    ///< (m) int32
  TensorView logits;     ///< (m, width) float32, last dimension contiguous; written
  bool compressed = false;  ///< key j of row i in column j - key_begin[i], instead of column j
  bool clean = true;        ///< -inf in every other column; otherwise they are left alone
};

/// Scores of next_n query tokens of each of b requests over the keys of the request in a cache.
struct PagedMqaLogitsArgs {
  TensorView q;        ///< (b, next_n, H, D) uint8, e4m3; any next_n; the last two dimensions contiguous
  TensorView weights;  ///< (b * next_n, H) float32, last dimension contiguous
  TensorView cache;    ///< index keys, any page_size
  /// (b, next_n) int32: keys that each query token scores, 0 included; or (b): of the last token of each
  /// request, each token before it scores one less (bottom-right, as causal attention has it).
  TensorView context_lens;
  TensorView block_table;  ///< (b, max_blocks) int32, last dimension contiguous
  TensorView logits;       ///< (b * next_n, width) float32, last dimension contiguous; written
  bool clean = true;       ///< -inf in columns from context_lens on; otherwise they are left alone
};

/// Bytes of scratch memory, on the tensors' device, 64-byte aligned. Depends on shapes and options alone.
FLASH_MLA_API std::size_t mqa_logits_workspace_size(const MqaLogitsArgs& args,
                                                    const IndexerOptions& options = {});
FLASH_MLA_API std::size_t paged_mqa_logits_workspace_size(const PagedMqaLogitsArgs& args,
                                                          const IndexerOptions& options = {});

/// Writes the logits above: products of e4m3 exact, sums in float32. A logit's bits depend on its query token and
/// its key alone. Keys outside a row's, and pages past a request's length, may hold anything, NaN included, and
/// reach nothing; a NaN among a row's own reaches that logit.
///
/// Allocates nothing and synchronises with nothing; offsets are 64 bits. On the host every argument is checked
/// before anything is written. Throws InvalidArgument (argument, value, what was expected) or Unsupported.
FLASH_MLA_API void mqa_logits(const MqaLogitsArgs& args, void* workspace, std::size_t workspace_bytes,
                              const IndexerOptions& options = {});
FLASH_MLA_API void paged_mqa_logits(const PagedMqaLogitsArgs& args, void* workspace,
                                    std::size_t workspace_bytes, const IndexerOptions& options = {});

/// Of logits and selection in one call.
struct MqaTopKOptions {
  IndexerOptions indexer{};
  /// Rows go in chunks whose logits take at most so many bytes; one row is always taken.
  std::size_t logits_bytes = std::size_t{64} << 20;
};

/// mqa_logits followed by top_k, without logits of the caller's: args.logits is not given, and args.compressed
/// and args.clean say nothing. Positions are counted from key_begin; output.offsets = key_begin makes them those
/// of k. indices (m, k) int32, as in TopKArgs.
FLASH_MLA_API std::size_t mqa_top_k_workspace_size(const MqaLogitsArgs& args, const TopKOutput& output,
                                                   const TensorView& indices,
                                                   const MqaTopKOptions& options = {});
FLASH_MLA_API void mqa_top_k(const MqaLogitsArgs& args, const TopKOutput& output, const TensorView& indices,
                             void* workspace, std::size_t workspace_bytes,
                             const MqaTopKOptions& options = {});

/// The same over a cache. indices (b * next_n, k) int32; output.block_table turns positions into slots (it may be
/// args.block_table, where the attended cache has the same pages). No row is longer than max_blocks * page_size,
/// which is what a chunk's logits are counted with.
FLASH_MLA_API std::size_t paged_mqa_top_k_workspace_size(const PagedMqaLogitsArgs& args,
                                                         const TopKOutput& output, const TensorView& indices,
                                                         const MqaTopKOptions& options = {});
FLASH_MLA_API void paged_mqa_top_k(const PagedMqaLogitsArgs& args, const TopKOutput& output,
                                   const TensorView& indices, void* workspace, std::size_t workspace_bytes,
                                   const MqaTopKOptions& options = {});

namespace reference {

/// The logits by the definition: one thread, every sum in float64. `logits` may be float32 or float64.
FLASH_MLA_API void mqa_logits(const MqaLogitsArgs& args);
FLASH_MLA_API void paged_mqa_logits(const PagedMqaLogitsArgs& args);

}  // namespace reference
}  // namespace flash_mla
