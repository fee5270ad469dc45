#pragma once

// What the host hands to the sparse decode kernel.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/sm90/params.h"

namespace flash_mla::sm90 {

/// One cache and the list of its tokens that each query attends to.
struct ListedKeys {
  const std::byte* cache;                 ///< null: there is none
  std::uint32_t page_units, token_units;  ///< from a page or token to the next, in units of 16 bytes
  int page_size;                          ///< tokens
  /// n / page_size is (n * page_magic >> 32) >> page_shift for n < 2^31, and n where page_magic is 0.
  std::uint32_t page_magic, page_shift;
  int topk;                     ///< entries of a list
  const std::int32_t* indices;  ///< (batch, s_q, topk): page * page_size + offset; negative: none
  std::int64_t indices_stride_b, indices_stride_s;
  const std::int32_t* topk_length;  ///< (batch): entries that count, or null: all
};

/// Sets what divides by page_size.
constexpr void set_page_size(ListedKeys& k, int page_size) {
  k.page_size = page_size;
  k.page_shift = 0;
  while ((std::int64_t{2} << k.page_shift) < page_size) ++k.page_shift;
  // 2^(32 + shift) / page_size, rounded up, is below 2^32 for page_size > 2^shift; off by less than 2^-31 of itself.
  const std::uint64_t power = std::uint64_t{1} << (32 + k.page_shift);
  k.page_magic = page_size == 1 ? 0
                                : static_cast<std::uint32_t>((power + static_cast<unsigned>(page_size) - 1) /
                                                             static_cast<unsigned>(page_size));
}

/// The lists lie behind each other, each padded to whole tiles.
struct SparseDecodeParams : DecodeParams, ListsOfCombine {
  ListedKeys keys[2];
  float cache_scale = 1.0f;  ///< of kFp8Tensor
};

}  // namespace flash_mla::sm90
