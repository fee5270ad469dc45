#pragma once

#include "kernels/attention/gqa/problem.h"

namespace flash_mla::reference {

/// reference::gqa_attention; arguments have been checked. Reads q, k and v as `args` has them, masks as `problem` does.
void gqa_attention(const GqaArgs& args, const gqa::Problem& problem, double scale);

}  // namespace flash_mla::reference
