#pragma once

#include <cstdint>

#include "base/routing.h"
#include "flash_mla/export.h"

namespace flash_mla::cpu {

/// The experts of one token. `logits` (num_experts) are the router's outputs; `bias` of the same size,
/// or null. Writes experts_per_token ids and weights, best first, of equals the lower id first.
///
/// Softmax or sigmoid scores; greedy, group-limited (DeepSeek-V2, arXiv 2405.04434, section 2.2.2) or
/// bias-corrected selection (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). The bias chooses and never
/// weighs.
FLASH_MLA_API void choose_experts(const Routing& routing, const float* logits, const float* bias,
                                  std::int32_t* ids, float* weights);

}  // namespace flash_mla::cpu
