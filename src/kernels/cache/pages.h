#pragma once

#include "base/integers.h"
#include "flash_mla/pages.h"

namespace flash_mla {

/// Where a token lies in a pool of pages.
struct PlaceInPages {
  std::int64_t page, offset;
};
inline PlaceInPages place_of(const PageAppendArgs& a, std::int64_t token) {
  const std::int64_t position = integer_at(a.positions, token), page_size = a.k_cache.size(1);
  const std::int64_t first = integer_at(a.page_indptr, integer_at(a.batch_indices, token));
  return {integer_at(a.page_indices, first + position / page_size), position % page_size};
}

namespace cpu {
/// flash_mla::append_pages on checked arguments.
void append_pages(const PageAppendArgs& args, int num_threads);
}  // namespace cpu

namespace sm90 {
/// The functions of include/flash_mla/pages.h on checked shapes, queued on `stream`. Throw Unsupported where the device is none that
/// this backend runs on.
void append_pages(const PageAppendArgs& args, void* stream);
void batch_positions(const TensorView& indptr, const TensorView& seqlens, const TensorView& batch_indices,
                     const TensorView& positions, void* stream);
void paged_seqlens(const TensorView& page_indptr, const TensorView& last_page_len, std::int64_t page_size,
                   const TensorView& seqlens, void* stream);
}  // namespace sm90

}  // namespace flash_mla
