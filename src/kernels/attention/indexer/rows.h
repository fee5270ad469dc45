#pragma once

// The rows of one call of the indexer and where their keys lie: in one array, or in the pages of a request. An
// array is a page that holds everything.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "flash_mla/indexer.h"

namespace flash_mla::indexer {

inline constexpr std::int64_t kScaleBytes = 4;

struct Rows {
  std::int64_t num_rows = 0;
  std::int64_t rows_per_request = 1;  ///< of neighbours, with one row of the block table
  int heads = 0, dim = 0;

  const std::byte* q = nullptr;
  std::int64_t q_request_bytes = 0, q_row_bytes = 0;  ///< from request to request, from row to row within one
  const float* weights = nullptr;
  std::int64_t weights_stride = 0;

  const std::byte* keys = nullptr;
  const std::byte* scales = nullptr;  ///< float32; null where keys have none
  std::int64_t key_bytes = 0, page_bytes = 0;
  std::int64_t page_size = std::numeric_limits<std::int64_t>::max();
  const std::int32_t* table = nullptr;  ///< null: one page
  std::int64_t table_stride = 0;

  const std::int32_t* key_begin = nullptr;  ///< null: 0
  const std::int32_t* key_end = nullptr;
  bool end_of_last_row = false;  ///< key_end has one entry per request, for its last row
  std::int64_t max_keys = 0;     ///< no row has more

  std::int64_t request(std::int64_t row) const { return row / rows_per_request; }
  const std::byte* query(std::int64_t row) const {
    return q + request(row) * q_request_bytes + row % rows_per_request * q_row_bytes;
  }
  std::int64_t begin(std::int64_t row) const { return key_begin != nullptr ? key_begin[row] : 0; }
  std::int64_t end(std::int64_t row) const {
    if (!end_of_last_row) return key_end[row];
    const std::int64_t later = rows_per_request - 1 - row % rows_per_request;
    return std::max<std::int64_t>(key_end[request(row)] - later, 0);
  }
  /// Bytes from the first page of `keys` or `scales` to the place of key j, whose own size is `bytes`.
  std::int64_t place(std::int64_t request, std::int64_t j, std::int64_t bytes) const {
    if (table == nullptr) return j * bytes;
    return table[request * table_stride + j / page_size] * page_bytes + j % page_size * bytes;
  }
};

inline Rows make_rows(const MqaLogitsArgs& a) {
  Rows r;
  r.num_rows = a.q.size(0);
  r.heads = static_cast<int>(a.q.size(1));
  r.dim = static_cast<int>(a.q.size(2));
  r.q = a.q.ptr<const std::byte>();
  r.q_request_bytes = a.q.stride(0);
  r.weights = a.weights.ptr<const float>();
  r.weights_stride = a.weights.stride(0);
  r.keys = a.k.ptr<const std::byte>();
  r.key_bytes = a.k.stride(0);
  r.scales = a.k_scales.ptr<const std::byte>();
  r.key_begin = a.key_begin.ptr<const std::int32_t>();
  r.key_end = a.key_end.ptr<const std::int32_t>();
  r.max_keys = a.k.size(0);
  return r;
}

inline Rows make_rows(const PagedMqaLogitsArgs& a) {
  Rows r;
  r.num_rows = a.q.size(0) * a.q.size(1);
  r.rows_per_request = std::max<std::int64_t>(a.q.size(1), 1);
  r.heads = static_cast<int>(a.q.size(2));
  r.dim = static_cast<int>(a.q.size(3));
  r.q = a.q.ptr<const std::byte>();
  r.q_request_bytes = a.q.stride(0);
  r.q_row_bytes = a.q.stride(1);
  r.weights = a.weights.ptr<const float>();
  r.weights_stride = a.weights.stride(0);
  r.page_size = a.cache.size(1);
  r.page_bytes = a.cache.stride(0);
  r.keys = a.cache.ptr<const std::byte>();
  r.key_bytes = r.dim;
  r.scales = r.keys + r.page_size * r.dim;
  r.table = a.block_table.ptr<const std::int32_t>();
  r.table_stride = a.block_table.stride(0);
  r.key_end = a.context_lens.ptr<const std::int32_t>();
  r.end_of_last_row = a.context_lens.rank == 1;
  r.max_keys = a.block_table.size(1) * r.page_size;
  return r;
}

/// Where logits go: key j of a row in column j, or counted from the row's first key.
struct Logits {
  float* data = nullptr;
  std::int64_t stride = 0, width = 0;
  bool compressed = false;
  bool clean = false;
};

}  // namespace flash_mla::indexer
