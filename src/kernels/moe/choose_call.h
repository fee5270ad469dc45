#pragma once

// flash_mla::choose_experts (include/flash_mla/routing.h) as backends take it: arguments have been checked.

#include "base/routing.h"
#include "flash_mla/routing.h"

namespace flash_mla {

struct ChooseCall {
  TensorView logits, bias, ids, weights;  ///< bias may be undefined
  Routing routing;
};

namespace cpu {
void choose_experts(const ChooseCall& call, int num_threads);
}  // namespace cpu

}  // namespace flash_mla
