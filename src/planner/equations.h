#pragma once

// The model's equations, as four sheets: the article's and the exact ones, for prefill and for decode.

#include "flash_mla/planner.h"
#include "planner/sheet.h"

namespace flash_mla::planner {

enum class PhaseKind { kPrefill, kDecode };

const Sheet& sheet(Mode mode, PhaseKind phase);

}  // namespace flash_mla::planner
