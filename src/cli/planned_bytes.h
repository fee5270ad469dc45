#pragma once

#include <filesystem>
#include <string>

#include "flash_mla/engine.h"

namespace flash_mla::cli {

/// One line: the bytes of weights and cache that a rank of the engine has, the largest of all, and what the planner counts
/// for a card of the same plan. Where the planner does not know the model, the engine's alone.
std::string planned_bytes(const std::filesystem::path& model_directory, const EngineOptions& options,
                          const EngineStats& stats);

}  // namespace flash_mla::cli
