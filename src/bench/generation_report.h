#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "flash_mla/engine.h"

namespace flash_mla::bench {

/// What an engine has done: counts, latencies and rates since it was made. `seconds` is the wall time of the
/// generation, `load_seconds` that of loading the model.
nlohmann::ordered_json generation_report(const Engine& engine, double load_seconds, double seconds);

/// The same in one line, without a line break.
std::string generation_summary(const nlohmann::ordered_json& report);

/// Prints a continuation's text to stdout as it comes.
void print_text_of(const GenerationEvent& event);

}  // namespace flash_mla::bench
