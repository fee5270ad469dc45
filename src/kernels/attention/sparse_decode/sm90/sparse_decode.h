#pragma once

// The Hopper backend's side of flash_mla::sparse_decode. Free of CUDA headers. Implemented by sparse_decode.cpp, or by
// dense_decode/sm90/not_built.cpp in a build without CUDA.

#include <cstddef>

#include "flash_mla/sparse.h"

namespace flash_mla::sm90 {

/// Throws Unsupported or InvalidArgument for shapes, formats, strides and devices that the kernels do not take.
void check_supported(const SparseDecodeArgs& args, int fixed_split_blocks);

std::size_t sparse_decode_workspace_size(const SparseDecodeArgs& args, int fixed_split_blocks);

/// Arguments have been checked.
void sparse_decode(const SparseDecodeArgs& args, void* workspace, float softmax_scale, int fixed_split_blocks,
                   void* stream);

}  // namespace flash_mla::sm90
