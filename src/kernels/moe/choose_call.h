#pragma once

// flash_mla::choose_experts (include/flash_mla/routing.h) as backends take it: arguments have been checked.

#include "base/routing.h"
#include "flash_mla/routing.h"

namespace flash_mla {

struct ChooseCall {
  TensorView logits, bias, ids, weights;  ///< bias may be undefined
  Routing routing;
};

/// What the kernel of a GPU takes.
inline constexpr int kMaxGpuExperts = 512, kMaxGpuExpertsPerToken = 32, kMaxGpuGroups = 32;

namespace cpu {
void choose_experts(const ChooseCall& call, int num_threads);
}  // namespace cpu

namespace sm90 {
/// Of float32 logits, bias and weights with dense rows, within the limits above; queued on `stream`.
void choose_experts(const ChooseCall& call, void* stream);
}  // namespace sm90

}  // namespace flash_mla
