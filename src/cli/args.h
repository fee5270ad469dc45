#pragma once

// Values of command-line flags: their types, and checks that say what was expected.

#include <CLI/CLI.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "flash_mla/tensor.h"

namespace flash_mla::cli {

/// What the user typed is wrong, though CLI11 could not see it. Exit code 2, as for any bad flag.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// "bf16" or "bfloat16", "fp16" or "float16", "fp32" or "float32". Throws UsageError.
DType parse_dtype(const std::string& text);

/// "bf16", "fp16", "fp32".
const char* short_dtype(DType dtype);

/// Accepts the names of parse_dtype.
CLI::Validator dtype_check();

/// Accepts an integer from `lowest` to `highest`.
CLI::Validator integer_between(long long lowest, long long highest);

/// Accepts a number from `lowest` to `highest`.
CLI::Validator number_between(double lowest, double highest);

/// The command line of this process, its first word reduced to the program's name.
std::string command_line();

}  // namespace flash_mla::cli
