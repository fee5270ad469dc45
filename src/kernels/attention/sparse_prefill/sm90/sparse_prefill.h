#pragma once

// The Hopper backend's side of flash_mla::sparse_prefill. Free of CUDA headers. Implemented by sparse_prefill.cpp, or by
// dense_decode/sm90/not_built.cpp in a build without CUDA.

#include "flash_mla/sparse.h"

namespace flash_mla::sm90 {

/// Throws Unsupported or InvalidArgument for formats, strides and devices that the kernels do not take.
void check_supported(const SparsePrefillArgs& args);

/// Arguments have been checked. Needs no workspace.
void sparse_prefill(const SparsePrefillArgs& args, float softmax_scale, void* stream);

}  // namespace flash_mla::sm90
