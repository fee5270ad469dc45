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

}  // namespace flash_mla
