#pragma once

// The Hopper backend's side of flash_mla::top_k. Free of CUDA headers. Implemented by top_k.cu, or by
// dense_decode/sm90/not_built.cpp in a build without CUDA.

#include <cstddef>

#include "flash_mla/top_k.h"

namespace flash_mla::sm90 {

/// Arguments have been checked. Needs no workspace.
void top_k(const TopKArgs& args, void* stream);

}  // namespace flash_mla::sm90
