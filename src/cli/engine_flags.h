#pragma once

#include <CLI/CLI.hpp>

#include "flash_mla/engine.h"

namespace flash_mla::cli {

/// Adds the flags that make EngineOptions; they write into `options` when the command line is parsed.
void add_engine_flags(CLI::App& app, EngineOptions& options);

/// Adds the flags that make SamplingParams. Values are checked by the engine.
void add_sampling_flags(CLI::App& app, SamplingParams& params);
/// Whatever sampling flags were not given become the model's own defaults (Engine::default_sampling).
void use_model_defaults(const CLI::App& app, const SamplingParams& defaults, SamplingParams& params);

}  // namespace flash_mla::cli
