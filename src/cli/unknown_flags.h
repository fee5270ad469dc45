#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace flash_mla::cli {

/// One of `names` that `word` may have been meant for; empty if none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& names);

/// What the command line has that its command does not know: flags, in the order in which they were given, each with
/// the nearest known one; or else arguments. Empty if there is nothing of the kind. To be called when parsing
/// has failed.
std::string unknown_arguments(const CLI::App& app, int argc, const char* const* argv);

}  // namespace flash_mla::cli
