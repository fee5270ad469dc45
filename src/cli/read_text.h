#pragma once

#include <string>

namespace flash_mla::cli {

/// All of a file, which may be a pipe. Throws InvalidArgument that calls it `name` and says what was expected of it.
std::string read_text(const std::string& path, const std::string& name, const char* expected);

}  // namespace flash_mla::cli
