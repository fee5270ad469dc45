#pragma once

#include <span>
#include <string>

#include "flash_mla/engine.h"

namespace flash_mla::engine {

/// Steps as Chrome trace events in JSON.
std::string chrome_trace(std::span<const StepRecord> steps);

}  // namespace flash_mla::engine
