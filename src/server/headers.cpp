#include "server/headers.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <random>

namespace flash_mla::server {
namespace {

bool equal_in_constant_time(std::string_view a, std::string_view b) {
  unsigned difference = a.size() != b.size();
  for (std::size_t i = 0; i < a.size(); ++i) {
    const char other = b.empty() ? '\0' : b[i % b.size()];
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(other);
  }
  return difference == 0;
}

bool allowed_in_id(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' ||
         c == '.' || c == ':';
}

}  // namespace

std::string_view path_of(std::string_view target) { return target.substr(0, target.find('?')); }

std::string_view bearer_key(std::string_view authorization) {
  constexpr std::string_view kBearer = "bearer ";
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
  if (!std::ranges::equal(authorization.substr(0, kBearer.size()), kBearer, {}, lower)) return authorization;
  authorization.remove_prefix(kBearer.size());
  authorization.remove_prefix(std::min(authorization.find_first_not_of(' '), authorization.size()));
  return authorization;
}

bool is_known_key(std::string_view given, const std::vector<std::string>& keys) {
  bool known = false;
  for (const std::string& key : keys) known |= equal_in_constant_time(given, key);
  return known;
}

std::string request_id(std::string_view given) {
  if (!given.empty() && given.size() <= 128 && std::ranges::all_of(given, allowed_in_id)) {
    return std::string(given);
  }
  static const std::uint64_t process = [] {
    std::random_device random;
    return (std::uint64_t{random()} << 32) | random();
  }();
  static std::atomic<std::uint64_t> next = 1;
  return fmt::format("req-{:016x}-{:x}", process, next++);
}

}  // namespace flash_mla::server
