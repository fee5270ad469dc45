#pragma once

#include <span>
#include <string>

#include "flash_mla/engine.h"

namespace flash_mla::server {

/// The answer of GET /experts: `layers` has for every mixture layer its number, how often each of its experts has been chosen
/// (`counts`), which `flash-mla experts plan` and `plan --experts` take as it is, and how even that is; beside it the same of
/// all layers together.
std::string experts_json(std::span<const ExpertCounts> layers);

}  // namespace flash_mla::server
