#include "cli/read_text.h"

#include <fmt/format.h>

#include <fstream>
#include <sstream>

#include "flash_mla/error.h"

namespace flash_mla::cli {

std::string read_text(const std::string& path, const std::string& name, const char* expected) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf()))
    throw InvalidArgument(fmt::format("{}: cannot be read; expected {}", name, expected));
  return text.str();
}

}  // namespace flash_mla::cli
