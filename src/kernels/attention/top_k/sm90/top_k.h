#pragma once

// The Hopper backend's side of flash_mla::top_k. Free of CUDA headers. Implemented by top_k.cu, or by
// dense_decode/sm90/not_built.cpp in a build without CUDA.

#include <cstdint>

#include "flash_mla/top_k.h"

namespace flash_mla::sm90 {

/// Arguments have been checked. Needs no workspace. The rows are those from `first_row` on of a call whose requests
/// have `rows_per_request` each (where there is a block table and no row_request).
void top_k(const TopKArgs& args, std::int64_t first_row, std::int64_t rows_per_request, void* stream);

}  // namespace flash_mla::sm90
