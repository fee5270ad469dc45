#pragma once

#include <cstddef>

#include "kernels/attention/gqa/problem.h"

namespace flash_mla::cpu {

/// The CPU backend of flash_mla::gqa_attention. Arguments have been checked; num_threads is at least 1.
struct GqaCall {
  gqa::Problem problem;
  DType dtype = DType::kBFloat16;
  DecodeScheduleView schedule{};  ///< parts may be undefined
  int num_threads = 1;
};

/// Reads cu_seqlens_q and, with fixed split points, num_splits.
std::size_t gqa_workspace_size(const GqaCall& call);

void gqa_attention(const GqaCall& call, void* workspace);

}  // namespace flash_mla::cpu
