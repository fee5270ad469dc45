#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "flash_mla/engine.h"

namespace flash_mla::cli {

/// How much is said on stderr while a model is loaded.
struct Talk {
  bool quiet = false, verbose = false;
};

/// Adds --verbose, and --quiet unless the command has its own.
void add_talk_flags(CLI::App& app, Talk& talk);

/// Says how large the model is, and how far its loading: on a terminal, or with --verbose, as it comes, else in one
/// line at the beginning and one at the end. `name` begins the lines.
void show_loading(EngineOptions& options, const Talk& talk, const std::string& name);

}  // namespace flash_mla::cli
