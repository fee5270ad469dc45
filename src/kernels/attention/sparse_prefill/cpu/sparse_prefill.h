#pragma once

#include <cstddef>

#include "flash_mla/sparse.h"
#include "kernels/attention/sparse_decode/cpu/sparse_decode.h"

namespace flash_mla::cpu {

/// The CPU backend of flash_mla::sparse_prefill, on checked arguments.
std::size_t sparse_prefill_workspace_size(const SparsePrefillArgs& args, const SparseParams& params);

void sparse_prefill(const SparsePrefillArgs& args, void* workspace, const SparseParams& params);

}  // namespace flash_mla::cpu
