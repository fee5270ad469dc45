#include "server/origin.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "flash_mla/error.h"

namespace flash_mla::server {
namespace {

char lower(char c) { return static_cast<char>(std::tolower(static_cast<unsigned char>(c))); }

bool equal(std::string_view a, std::string_view b) { return std::ranges::equal(a, b, {}, lower, lower); }

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// "[::1]:8000" to "[::1]", "a.b:8000" to "a.b", "a.b." to "a.b".
std::string_view without_port(std::string_view host) {
  if (host.starts_with('[')) return host.substr(0, host.find(']') + 1);
  host = host.substr(0, host.find(':'));
  if (host.ends_with('.')) host.remove_suffix(1);
  return host;
}

// A name whose last label is digits is read as an IPv4 address everywhere, and resolved nowhere.
bool is_address(std::string_view name) {
  if (name.starts_with('[')) return name.ends_with(']');
  const std::string_view last = name.substr(name.rfind('.') + 1);
  return !last.empty() && std::ranges::all_of(last, is_digit);
}

bool is_below(std::string_view name, std::string_view dot_domain) {
  return name.size() > dot_domain.size() && equal(name.substr(name.size() - dot_domain.size()), dot_domain);
}

}  // namespace

bool is_allowed_host(std::string_view host, const std::vector<std::string>& allowed, bool loopback) {
  const std::string_view name = without_port(host);
  if (name.empty()) return host.empty();  // HTTP/1.0 without Host: no browser
  if (is_address(name) || equal(name, "localhost") || is_below(name, ".localhost")) return true;
  if (allowed.empty()) return !loopback || name.find('.') == std::string_view::npos;
  return std::ranges::any_of(allowed, [&](std::string_view one) {
    if (one == "*") return true;
    return one.starts_with("*.") ? is_below(name, one.substr(1)) : equal(name, one);
  });
}

bool is_allowed_origin(std::string_view origin, const std::vector<std::string>& allowed) {
  return std::ranges::any_of(allowed, [&](std::string_view one) { return one == "*" || equal(origin, one); });
}

void check_allowed_host(std::string_view name) {
  const std::string_view plain = name.starts_with("*.") ? name.substr(2) : name;
  const bool named = !plain.empty() && std::ranges::all_of(plain, [](char c) {
    return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z') || c == '-' || c == '.' || c == '_';
  });
  if (name == "*" || named) return;
  throw InvalidArgument(
      fmt::format("--allowed-host is \"{}\", expected a name without port such as api.example.com, "
                  "*.example.com, or *",
                  name));
}

void check_cors_origin(std::string_view origin) {
  const std::size_t scheme = origin.find("://");
  const std::string_view rest =
      scheme == std::string_view::npos ? std::string_view() : origin.substr(scheme + 3);
  const bool printable = std::ranges::all_of(origin, [](char c) { return c > ' ' && c <= '~'; });
  if (origin == "*" ||
      (printable && scheme > 0 && !rest.empty() && rest.find_first_of("/*?#,") == rest.npos)) {
    return;
  }
  throw InvalidArgument(fmt::format(
      "--cors-origin is \"{}\", expected scheme and host such as https://app.example.com, or *", origin));
}

bool is_list_of_names(std::string_view text) {
  return std::ranges::all_of(text, [](char c) {
    return is_digit(c) || (lower(c) >= 'a' && lower(c) <= 'z') ||
           std::string_view("!#$%&'*+-.^_`|~, ").find(c) != std::string_view::npos;
  });
}

}  // namespace flash_mla::server
