#include "cli/args.h"

#include <fmt/format.h>

#include <charconv>
#include <string>

#include "bench/dtype.h"

namespace flash_mla::cli {

CLI::Validator dtype_check() {
  return CLI::Validator(
      [](std::string& text) {
        return bench::find_dtype(text)
                   ? std::string{}
                   : fmt::format("value is \"{}\", expected {}", text, bench::kDtypeNames);
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

}  // namespace flash_mla::cli
