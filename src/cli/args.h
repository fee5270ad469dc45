#pragma once

// Checks of command-line flags that say what was expected.

#include <CLI/CLI.hpp>

namespace flash_mla::cli {

/// Accepts the names of bench::find_dtype.
CLI::Validator dtype_check();

/// Accepts an integer from `lowest` to `highest`.
CLI::Validator integer_between(long long lowest, long long highest);

/// Accepts a number from `lowest` to `highest`.
CLI::Validator number_between(double lowest, double highest);

}  // namespace flash_mla::cli
