#include "planner/number.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

namespace flash_mla::planner {

std::string significant(double x, int digits) {
  if (x == 0 || !std::isfinite(x)) return fmt::format("{}", x);
  // Rounded first: 9999.6 has five digits before the point, not four.
  const double rounded = std::strtod(fmt::format("{:.{}e}", x, digits - 1).c_str(), nullptr);
  const int exponent = static_cast<int>(std::floor(std::log10(std::abs(rounded))));
  const int decimals = digits - 1 - exponent;
  std::string out = fmt::format("{:.{}f}", rounded, decimals > 0 ? decimals : 0);
  if (decimals <= 0) return out;
  out.erase(out.find_last_not_of('0') + 1);
  if (out.ends_with('.')) out.pop_back();
  return out;
}

std::string shortest(double x) {
  std::array<char, 1100> text;  // 1e-308 has 308 zeros and up to 17 digits
  const auto [end, error] =
      std::to_chars(text.data(), text.data() + text.size(), x, std::chars_format::fixed);
  return error == std::errc{} ? std::string(text.data(), end) : fmt::format("{}", x);
}

}  // namespace flash_mla::planner
