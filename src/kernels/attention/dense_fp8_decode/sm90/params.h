#pragma once

// What the host hands to the kernel of dense decode over FP8 caches.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/sm90/params.h"

namespace flash_mla::sm90 {

struct DenseFp8Params : DecodeParams {
  const std::byte* cache;
  std::int64_t page_stride, token_stride;  ///< bytes
  bool whole_tiles;                        ///< the rows of a tile follow each other in one page
  float cache_scale;                       ///< of kFp8Tensor, else 1
};

}  // namespace flash_mla::sm90
