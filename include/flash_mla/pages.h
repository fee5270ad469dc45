#pragma once

#include <cstdint>

#include "flash_mla/export.h"
#include "flash_mla/rows.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// Keys and values of new tokens, and the pages of the sequences that they belong to. Pages are named as in a CSR matrix: those
/// of sequence i are page_indices[page_indptr[i]] to page_indices[page_indptr[i + 1] - 1], in order. Integers are int32 or int64.
struct PageAppendArgs {
  TensorView key;            ///< (n, h, d), any dtype
  TensorView value{};        ///< optional, (n, h, d_v), key's dtype
  TensorView batch_indices;  ///< (n): the sequence of each token
  TensorView positions;      ///< (n): its position there
  TensorView page_indptr;    ///< (b + 1)
  TensorView page_indices;   ///< (at least page_indptr[b])
  /// (num_pages, page_size, h, d), key's dtype, last dimension contiguous, other strides free: a pool in HND order is the view
  /// with dimensions 1 and 2 swapped. Latents are one head. Written at the tokens' places, and nowhere else.
  TensorView k_cache;
  TensorView v_cache{};  ///< (num_pages, page_size, h, d_v); given with value
};

/// Copies tokens to their places in the pages. Two tokens of one place: one of them is there afterwards. On the CPU all numbers are
/// checked before anything is written: sequences, positions past a sequence's pages, pages outside the pool. On a GPU, where the
/// host reads none of them, a token whose sequence or position is negative or past the last, or whose page is outside the pool, is
/// written nowhere; page_indptr has to be right. The work is queued on options.stream and may be captured. Nothing is allocated.
/// Throws InvalidArgument (argument, value, what was expected) or Unsupported.
FLASH_MLA_API void append_pages(const PageAppendArgs& args, const RowOptions& options = {});

/// The sequence and the position of each of n new tokens, those of a sequence being its last ones.
///
/// indptr: (b + 1), tokens indptr[i] to indptr[i + 1] - 1 belong to sequence i, from 0 to n; seqlens: (b), with the new tokens.
/// batch_indices, positions: (n), written. Integers are int32 or int64. On a GPU a token behind indptr[b] gets -1 for both, which
/// append_pages passes over: a graph may be made for more tokens than there are. Otherwise as append_pages.
FLASH_MLA_API void batch_positions(const TensorView& indptr, const TensorView& seqlens,
                                   const TensorView& batch_indices, const TensorView& positions,
                                   const RowOptions& options = {});

/// The length of each sequence: all of its pages but the last are full. page_indptr: (b + 1), last_page_len: (b), 1 to
/// page_size where a sequence has pages; seqlens: (b), written, 0 of one without pages. As append_pages; on a GPU numbers are the
/// caller's to get right.
FLASH_MLA_API void paged_seqlens(const TensorView& page_indptr, const TensorView& last_page_len,
                                 std::int64_t page_size, const TensorView& seqlens,
                                 const RowOptions& options = {});

}  // namespace flash_mla
