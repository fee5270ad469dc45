#pragma once

#include <CLI/CLI.hpp>

namespace flash_mla::cli {

/// Adds --config FILE: a TOML file with the flags of `app`, by their names without dashes. Flags on the
/// command line and in the environment come first. Call it before the flags themselves are added. (CLI11's
/// set_config reads nothing for a subcommand.)
void add_config_flag(CLI::App& app);

}  // namespace flash_mla::cli
