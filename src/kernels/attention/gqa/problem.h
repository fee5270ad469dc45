#pragma once

// A call of gqa_attention as numbers and addresses, and what they mean: which queries, keys and pages a sequence has, and
// which keys a query sees. For the host and for kernels alike.

#include <cstdint>
#include <limits>

#include "flash_mla/gqa.h"

namespace flash_mla::gqa {

/// A token of keys and values.
struct Place {
  std::int64_t page;
  std::int64_t offset;
};

/// Keys [begin, end) that a query may see.
struct Range {
  std::int64_t begin, end;
};

/// Strides count elements.
struct Strides {
  std::int64_t page, token, head;
};

struct Problem {
  std::int32_t batch, h_q, h_kv, group, d_qk, d_v;
  std::int32_t page_size;  ///< more than any length where keys do not lie in pages
  std::int32_t uniform_q;  ///< queries of every sequence, without cu_q
  float scale, soft_cap;
  std::int64_t window_left,
      window_right;  ///< more than any length where there is none; causal: window_right is 0

  const void *q, *k, *v;
  void* out;
  float* lse;                                            ///< may be null
  Strides q_strides, k_strides, v_strides, out_strides;  ///< of q and out without `page`
  std::int64_t lse_head_stride, lse_token_stride;

  const std::int32_t *cu_q, *cu_k, *lengths;  ///< cu_q may be null; of cu_k and lengths one is there, or both
  const std::int32_t *table, *table_starts;   ///< pages, or null; of CSR where each sequence's begin
  std::int64_t table_stride;                  ///< of a block table
  const float *sinks, *slopes;                ///< may be null
  const std::uint8_t* mask;                   ///< may be null
  const std::int32_t* mask_starts;

  constexpr std::int64_t first_query(std::int64_t r) const {
    return cu_q != nullptr ? cu_q[r] : r * uniform_q;
  }
  constexpr std::int64_t queries(std::int64_t r) const {
    return cu_q != nullptr ? cu_q[r + 1] - cu_q[r] : uniform_q;
  }
  constexpr std::int64_t keys(std::int64_t r) const {
    return lengths != nullptr ? lengths[r] : cu_k[r + 1] - cu_k[r];
  }
  constexpr const std::int32_t* pages(std::int64_t r) const {
    return table + (table_starts != nullptr ? table_starts[r] : r * table_stride);
  }
  constexpr Place place(std::int64_t r, std::int32_t j) const {
    if (table != nullptr) return {pages(r)[j / page_size], j % page_size};
    return {cu_k != nullptr ? cu_k[r] : r, j};
  }
  /// Of a query whose sequence has so many queries and keys; by the options alone.
  constexpr Range visible(std::int64_t query, std::int64_t n, std::int64_t m) const {
    const std::int64_t position = m - n + query;
    const std::int64_t begin = position > window_left ? position - window_left : 0;
    const std::int64_t past = position + window_right + 1, end = past < m ? past : m;
    return {begin < m ? begin : m, end > 0 ? end : 0};
  }
  /// Whether the mask lets a query see a key.
  constexpr bool unmasked(std::int64_t r, std::int64_t query, std::int64_t key, std::int64_t m) const {
    if (mask == nullptr) return true;
    const std::int64_t bit = query * m + key;
    return ((mask[mask_starts[r] + bit / 8] >> (bit % 8)) & 1) != 0;
  }
};

/// Arguments have been checked.
inline Problem problem_of(const GqaArgs& a, const GqaOptions& o, float scale) {
  constexpr std::int64_t kNone = std::int64_t{1} << 40;
  constexpr std::int32_t kNoPages = std::numeric_limits<std::int32_t>::max();
  const auto strides = [](const TensorView& t) {
    const int head = t.rank - 2;
    // The stride of a dimension of one element may be anything, and means nothing.
    const auto at = [&](int dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; };
    if (t.rank == 3) return Strides{at(0), at(0), at(1)};
    return Strides{at(0), at(1), at(head)};
  };
  Problem p{};
  const bool paged = a.block_table.defined() || a.page_indices.defined();
  const TensorView& lengths = a.seqlens_k.defined() ? a.seqlens_k : a.cu_seqlens_k;
  p.batch = static_cast<std::int32_t>(a.seqlens_k.defined() ? lengths.size(0) : lengths.size(0) - 1);
  p.h_q = static_cast<std::int32_t>(a.q.size(1));
  p.h_kv = static_cast<std::int32_t>(a.k.size(a.k.rank - 2));
  p.group = p.h_q / p.h_kv;
  p.d_qk = static_cast<std::int32_t>(a.q.size(2));
  p.d_v = static_cast<std::int32_t>(a.out.size(2));
  p.page_size = paged ? static_cast<std::int32_t>(a.k.size(1)) : kNoPages;
  p.uniform_q = p.batch > 0 ? static_cast<std::int32_t>(a.q.size(0) / p.batch) : 0;
  p.scale = scale;
  p.soft_cap = o.soft_cap;
  p.window_left = o.window_left >= 0 ? o.window_left : kNone;
  p.window_right = o.causal ? 0 : o.window_right >= 0 ? o.window_right : kNone;
  p.q = a.q.data;
  p.k = a.k.data;
  p.v = a.v.data;
  p.out = a.out.data;
  p.lse = a.lse.ptr<float>();
  p.q_strides = strides(a.q);
  p.k_strides = strides(a.k);
  p.v_strides = strides(a.v);
  p.out_strides = strides(a.out);
  p.lse_head_stride = a.lse.defined() ? a.lse.stride(0) : 0;
  p.lse_token_stride = a.lse.defined() ? a.lse.stride(1) : 0;
  p.cu_q = a.cu_seqlens_q.ptr<const std::int32_t>();
  p.cu_k = a.cu_seqlens_k.ptr<const std::int32_t>();
  p.lengths = a.seqlens_k.ptr<const std::int32_t>();
  p.table = a.block_table.defined() ? a.block_table.ptr<const std::int32_t>()
                                    : a.page_indices.ptr<const std::int32_t>();
  p.table_starts = a.page_indptr.ptr<const std::int32_t>();
  p.table_stride = a.block_table.defined() ? a.block_table.stride(0) : 0;
  p.sinks = a.sinks.ptr<const float>();
  p.slopes = a.alibi_slopes.ptr<const float>();
  p.mask = a.mask.ptr<const std::uint8_t>();
  p.mask_starts = a.mask_indptr.ptr<const std::int32_t>();
  return p;
}

}  // namespace flash_mla::gqa
