#include "cli/args.h"

#include <fmt/format.h>

#include <charconv>
#include <fstream>
#include <iterator>

namespace flash_mla::cli {
namespace {

constexpr const char* kDtypes = "bf16, fp16 or fp32";

bool find_dtype(const std::string& text, DType& dtype) {
  for (const DType d : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    if (text == short_dtype(d) || text == dtype_name(d)) {
      dtype = d;
      return true;
    }
  }
  return false;
}

}  // namespace

const char* short_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "fp16";
    case DType::kFloat32:
      return "fp32";
    default:
      return dtype_name(dtype);
  }
}

DType parse_dtype(const std::string& text) {
  DType dtype{};
  if (!find_dtype(text, dtype)) {
    throw UsageError(fmt::format("dtype is \"{}\", expected {}", text, kDtypes));
  }
  return dtype;
}

CLI::Validator dtype_check() {
  return CLI::Validator(
      [](std::string& text) {
        DType dtype{};
        return find_dtype(text, dtype) ? std::string{}
                                       : fmt::format("value is \"{}\", expected {}", text, kDtypes);
      },
      "bf16|fp16|fp32", "dtype");
}

CLI::Validator integer_between(long long lowest, long long highest) {
  return CLI::Validator(
      [=](std::string& text) {
        long long value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, value);
        const bool ok = error == std::errc{} && stop == end && value >= lowest && value <= highest;
        return ok ? std::string{}
                  : fmt::format("value is \"{}\", expected an integer from {} to {}", text, lowest, highest);
      },
      fmt::format("{}..{}", lowest, highest), "integer");
}

CLI::Validator number_between(double lowest, double highest) {
  return CLI::Validator(
      [=](std::string& text) {
        double value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, value);
        const bool ok = error == std::errc{} && stop == end && value >= lowest && value <= highest;
        return ok ? std::string{}
                  : fmt::format("value is \"{}\", expected a number from {} to {}", text, lowest, highest);
      },
      fmt::format("{}..{}", lowest, highest), "number");
}

std::string command_line() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  const std::string raw((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::string line;
  for (std::size_t at = 0; at < raw.size();) {
    const std::size_t end = std::min(raw.find('\0', at), raw.size());
    std::string word = raw.substr(at, end - at);
    if (line.empty()) {
      word = word.substr(word.find_last_of('/') + 1);
    } else {
      line += ' ';
    }
    line += word;
    at = end + 1;
  }
  return line;
}

}  // namespace flash_mla::cli
