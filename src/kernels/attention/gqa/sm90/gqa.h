#pragma once

// The Hopper backend of gqa_attention. Free of CUDA headers. Implemented by gqa.cpp, or by not_built.cpp.

#include <cstddef>

#include "flash_mla/gqa.h"

namespace flash_mla::sm90 {

/// Throws Unsupported or InvalidArgument for what the kernel does not take.
void check_supported(const GqaArgs& args, const DecodeScheduleView& schedule);
std::size_t gqa_workspace_size(const GqaArgs& args, const DecodeScheduleView& schedule,
                               const GqaOptions& options);
/// Arguments have been checked.
void gqa_attention(const GqaArgs& args, const DecodeScheduleView& schedule, void* workspace,
                   const GqaOptions& options, float scale);
ScheduleOptions gqa_schedule_options(int device_index, int max_seqlen_q, int num_heads_q, int num_heads_k,
                                     int head_dim);

}  // namespace flash_mla::sm90
