#include "text/utf8.h"

#include <algorithm>

namespace flash_mla::text {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

struct Sequence {
  std::size_t length;  // bytes that belong together, at least 1
  bool valid;
  bool incomplete;  // not valid, but more bytes could make it so
};

unsigned byte_at(std::string_view text, std::size_t at) { return static_cast<unsigned char>(text[at]); }

/// What begins at `at` (Unicode standard, table 3-7).
Sequence sequence_at(std::string_view text, std::size_t at) {
  const unsigned lead = byte_at(text, at);
  if (lead < 0x80) return {1, true, false};
  if (lead < 0xc2 || lead > 0xf4) return {1, false, false};
  const std::size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  for (std::size_t i = 1; i < length; ++i) {
    if (at + i == text.size()) return {i, false, true};
    const unsigned byte = byte_at(text, at + i);
    unsigned low = 0x80, high = 0xbf;
    if (i == 1) {
      if (lead == 0xe0) low = 0xa0;   // not overlong
      if (lead == 0xed) high = 0x9f;  // no surrogate
      if (lead == 0xf0) low = 0x90;   // not overlong
      if (lead == 0xf4) high = 0x8f;  // at most U+10FFFF
    }
    if (byte < low || byte > high) return {i, false, false};
  }
  return {length, true, false};
}

}  // namespace

std::string_view replace_invalid_utf8(std::string_view text, std::string& storage) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Sequence s = sequence_at(text, at);
    if (!s.valid) break;
    at += s.length;
  }
  if (at == text.size()) return text;
  storage.assign(text.substr(0, at));
  while (at < text.size()) {
    const Sequence s = sequence_at(text, at);
    storage += s.valid ? text.substr(at, s.length) : kReplacement;
    at += s.length;
  }
  return storage;
}

std::size_t incomplete_utf8_suffix(std::string_view text) {
  for (std::size_t back = 1; back <= std::min<std::size_t>(3, text.size()); ++back) {
    const std::size_t at = text.size() - back;
    const bool continuation = (byte_at(text, at) & 0xc0) == 0x80;
    if (continuation) continue;
    const Sequence s = sequence_at(text, at);
    return s.incomplete && s.length == back ? back : 0;
  }
  return 0;
}

void append_utf8(char32_t c, std::string& out) {
  const auto put = [&](char32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | c >> 6);
    put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3f));
    put(0x80 | (c >> 6 & 0x3f));
    put(0x80 | (c & 0x3f));
  }
}

std::u32string utf8_to_code_points(std::string_view text) {
  std::u32string out;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = sequence_at(text, at).length;
    char32_t c = byte_at(text, at) & (length == 1 ? 0x7fu : 0xffu >> (length + 1));
    for (std::size_t i = 1; i < length; ++i) c = c << 6 | (byte_at(text, at + i) & 0x3f);
    out += c;
    at += length;
  }
  return out;
}

}  // namespace flash_mla::text
