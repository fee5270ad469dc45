#pragma once

// gqa_attention with many queries on Hopper: keys and values of their own, for each head or for a group of heads. Free of
// CUDA headers.

#include <cstddef>

#include "flash_mla/gqa.h"
#include "kernels/attention/gqa/problem.h"

namespace flash_mla::sm90 {

/// Whether grouped_prefill can work on this: head dimensions 64, 128, 192 / 128 or 256; no mask and no slopes; pages, if there
/// are any, of 8, 16, 32 or 64 tokens, or of a multiple of 128; fewer than a billion queries and keys.
bool grouped_prefill_takes(const GqaArgs& args);

/// Heads that share a tile of 128 rows: those of a group where that is a power of two, else one.
int grouped_prefill_heads(const GqaArgs& args);

/// Bytes of device memory that grouped_prefill works in: 256, and where it has fewer tiles of rows than multiprocessors those
/// of partial results, less than what 128 rows of output take in float32 on each multiprocessor.
std::size_t grouped_prefill_workspace_size(const GqaArgs& args);

/// As gqa_attention's contract (flash_mla/gqa.h), for arguments that have been checked. Deterministic. workspace: grouped_prefill_workspace_size() bytes, aligned to 16; need not be initialised. Allocates nothing, does not
/// synchronise, can be captured.
void grouped_prefill(const GqaArgs& args, const flash_mla::gqa::Problem& problem, void* workspace,
                     void* stream);

}  // namespace flash_mla::sm90
