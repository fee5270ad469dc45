#include "server/http_head.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <string>

namespace flash_mla::server {
namespace {

constexpr std::string_view kEndOfLine = "\r\n";

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_control(char c) { return (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f; }

// RFC 9110, 5.6.2.
bool is_token_character(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
         std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
}

bool equal_ignoring_case(std::string_view a, std::string_view lower) {
  return std::ranges::equal(a, lower,
                            [](char x, char y) { return std::tolower(static_cast<unsigned char>(x)) == y; });
}

std::string_view without_spaces_around(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// A value as it may stand in an answer.
std::string shown(std::string_view value) {
  std::string out(value.substr(0, 40));
  std::ranges::replace_if(
      out, [](char c) { return c < ' ' || c > '~' || c == '"'; }, '?');
  return out;
}

// What the fields say that matters here.
struct Fields {
  int hosts = 0, lengths = 0, encodings = 0;
  std::string_view host, length, encoding;
};

// Reads one line; why it is refused, or "".
std::string add(std::string_view line, Fields& fields) {
  if (line.front() == ' ' || line.front() == '\t') return "a header field is folded over several lines";
  const std::size_t colon = line.find(':');
  const std::string_view name = line.substr(0, colon);
  if (colon == std::string_view::npos || name.empty() || !std::ranges::all_of(name, is_token_character)) {
    return fmt::format("\"{}\" is no header field, expected NAME: VALUE", shown(line));
  }
  const std::string_view value = without_spaces_around(line.substr(colon + 1));
  if (equal_ignoring_case(name, "host")) {
    ++fields.hosts;
    fields.host = value;
  } else if (equal_ignoring_case(name, "content-length")) {
    ++fields.lengths;
    fields.length = value;
  } else if (equal_ignoring_case(name, "transfer-encoding")) {
    ++fields.encodings;
    fields.encoding = value;
  }
  return {};
}

std::string framing_error(const Fields& f, bool http_1_0) {
  if (f.encodings > 0) {
    if (http_1_0) return "Transfer-Encoding is no field of HTTP/1.0";
    if (f.lengths > 0) return "Content-Length and Transfer-Encoding are given, expected one of them";
    if (f.encodings > 1) return "Transfer-Encoding is given more than once";
    if (f.encoding != "chunked") {
      return fmt::format("Transfer-Encoding is \"{}\", expected \"chunked\"", shown(f.encoding));
    }
  }
  if (f.lengths > 1) return "Content-Length is given more than once";
  if (f.lengths == 1 && (f.length.empty() || !std::ranges::all_of(f.length, is_digit))) {
    return fmt::format("Content-Length is \"{}\", expected digits", shown(f.length));
  }
  return {};
}

}  // namespace

std::string head_error(std::string_view head) {
  if (head.ends_with("\r\n\r\n")) head.remove_suffix(2);
  Fields fields;
  bool http_1_0 = false, first = true;
  while (!head.empty()) {
    const std::size_t end = head.find(kEndOfLine);
    if (end == std::string_view::npos) return "a line does not end with CR LF";
    const std::string_view line = head.substr(0, end);
    head.remove_prefix(end + kEndOfLine.size());
    if (line.empty()) return "a line is empty";
    if (std::ranges::any_of(line, is_control)) return "a line holds a control character";
    if (first) {
      http_1_0 = line.ends_with(" HTTP/1.0");
      first = false;
      continue;
    }
    if (const std::string error = add(line, fields); !error.empty()) return error;
  }
  if (const std::string error = framing_error(fields, http_1_0); !error.empty()) return error;
  if (fields.hosts > 1) return "Host is given more than once";
  if (fields.hosts == 0 && !http_1_0) return "Host is missing";
  if (fields.host.find_first_of(" \t,/@?#\\") != std::string_view::npos) {
    return fmt::format("Host is \"{}\", expected one name or address", shown(fields.host));
  }
  return {};
}

}  // namespace flash_mla::server
