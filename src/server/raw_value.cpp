#include "server/raw_value.h"

#include <cstddef>

namespace flash_mla::server {
namespace {

constexpr std::string_view kBlanks = " \t\r\n";

std::size_t skip_blanks(std::string_view text, std::size_t at) {
  const std::size_t next = text.find_first_not_of(kBlanks, at);
  return next == std::string_view::npos ? text.size() : next;
}

// Behind the string that begins at `at`.
std::size_t skip_string(std::string_view text, std::size_t at) {
  for (++at; at < text.size() && text[at] != '"'; ++at) at += text[at] == '\\';
  return at + 1;
}

// Behind the value that begins at `at`.
std::size_t skip_value(std::string_view text, std::size_t at) {
  if (text[at] == '"') return skip_string(text, at);
  if (text[at] != '{' && text[at] != '[') {
    const std::size_t end = text.find_first_of(",]} \t\r\n", at);
    return end == std::string_view::npos ? text.size() : end;
  }
  for (int depth = 0; at < text.size();) {
    const char c = text[at];
    if (c == '"') {
      at = skip_string(text, at);
      continue;
    }
    ++at;
    if (c == '{' || c == '[') ++depth;
    if ((c == '}' || c == ']') && --depth == 0) break;
  }
  return at;
}

// The value of a name in the object that `text` is.
std::string_view member(std::string_view text, std::string_view name) {
  std::string_view found;
  std::size_t at = skip_blanks(text, 0);
  if (at >= text.size() || text[at] != '{') return {};
  for (at = skip_blanks(text, at + 1); at < text.size() && text[at] == '"';) {
    const std::size_t key = at;
    at = skip_string(text, at);
    const bool same = at - key == name.size() + 2 && text.substr(key + 1, name.size()) == name;
    at = skip_blanks(text, at);
    at = skip_blanks(text, at + 1);  // the colon
    if (at >= text.size()) return {};
    const std::size_t end = skip_value(text, at);
    if (same) found = text.substr(at, end - at);
    at = skip_blanks(text, end);
    if (at < text.size() && text[at] == ',') at = skip_blanks(text, at + 1);
  }
  return found;
}

}  // namespace

std::string_view raw_value(std::string_view text, std::span<const std::string_view> path) {
  for (const std::string_view name : path) text = member(text, name);
  return text;
}

}  // namespace flash_mla::server
