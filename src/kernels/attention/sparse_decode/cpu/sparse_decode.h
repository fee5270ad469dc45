#pragma once

#include <cstddef>

#include "flash_mla/sparse.h"

namespace flash_mla::cpu {

/// Of the CPU backends of flash_mla::sparse_decode and sparse_prefill. Arguments have been checked;
/// `softmax_scale` is resolved and `num_threads` is at least 1.
struct SparseParams {
  float softmax_scale = 1.0f;
  int num_threads = 1;
  int fixed_split_blocks = 0;
};

std::size_t sparse_decode_workspace_size(const SparseDecodeArgs& args, const SparseParams& params);

void sparse_decode(const SparseDecodeArgs& args, void* workspace, const SparseParams& params);

}  // namespace flash_mla::cpu
