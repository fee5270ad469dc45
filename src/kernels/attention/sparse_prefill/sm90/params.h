#pragma once

// What the host hands to the sparse prefill kernel.

#include <cstddef>
#include <cstdint>

namespace flash_mla::sm90 {

/// Division of n < 2^31 by a number known to the host: (n * magic >> 32) >> shift, and n where magic is 0.
/// (sparse_decode/sm90/params.h has the same inside ListedKeys; the two could be one.)
struct Divisor {
  std::uint32_t magic, shift;
};
constexpr Divisor divisor(std::uint32_t n) {
  Divisor d{0, 0};
  if (n <= 1) return d;
  while ((std::uint64_t{2} << d.shift) < n) ++d.shift;
  // 2^(32 + shift) / n, rounded up, is below 2^32 for n > 2^shift; off by less than 2^-31 of itself.
  d.magic = static_cast<std::uint32_t>(((std::uint64_t{1} << (32 + d.shift)) + n - 1) / n);
  return d;
}

/// Q by its elements, of 16 bits: (n, h_q, d_qk); strides count them.
struct QueryView {
  const std::uint16_t* data;
  std::int64_t stride_n, stride_h;
};

/// Strides count elements, but for those of the cache.
struct SparsePrefillParams {
  const std::byte* cache;
  std::uint32_t page_units, token_units;  ///< from a page or token to the next, in units of 16 bytes
  std::uint32_t page_size;                ///< tokens
  Divisor by_page_size;
  bool is_flat;  ///< slot n is n tokens from the beginning, whatever the pages, and no table says otherwise
  std::uint32_t slots;  ///< of the cache
  float cache_scale;    ///< of kFp8Tensor, else 1

  const std::int32_t* indices;  ///< (n, topk)
  std::int64_t indices_stride;
  const std::int32_t* topk_length;  ///< (n) or null
  int topk;

  // What an entry names: see SparsePrefillArgs.
  int batch;
  const std::int32_t* cu_seqlens_q;   ///< (batch + 1) or null
  const std::int32_t* cu_seqlens_k;   ///< (batch + 1) or null
  const std::int32_t* block_table;    ///< (batch, max_blocks) or null
  const std::int32_t* cache_seqlens;  ///< (batch), with block_table
  std::int64_t block_table_stride;

  int items;        ///< n * head_blocks
  int head_blocks;  ///< of a query token, of 64 heads
  Divisor by_head_blocks;
  int h_q;
  float scale_log2;        ///< softmax_scale * log2(e)
  const float* attn_sink;  ///< (h_q), natural log; or null

  void* out;
  std::int64_t out_stride_n, out_stride_h;
  float* max_logits;  ///< or null
  std::int64_t max_logits_stride_n, max_logits_stride_h;
  float* lse;  ///< or null
  std::int64_t lse_stride_n, lse_stride_h;
};

}  // namespace flash_mla::sm90
