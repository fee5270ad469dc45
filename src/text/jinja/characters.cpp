#include "text/jinja/characters.h"

#include <algorithm>

namespace flash_mla::text::jinja {
namespace {

bool continues(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

bool is_space(std::string_view character) {
  if (character.size() == 1) {
    const char c = character[0];
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32);
  }
  constexpr std::string_view kSpaces[] = {
      "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
      "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  return std::ranges::find(kSpaces, character) != std::end(kSpaces);
}

}  // namespace

std::size_t next_character(std::string_view text, std::size_t at) {
  ++at;
  while (at < text.size() && continues(text[at])) ++at;
  return at;
}

std::size_t count_characters(std::string_view text) {
  return text.size() - static_cast<std::size_t>(std::ranges::count_if(text, continues));
}

std::size_t byte_of_character(std::string_view text, std::size_t index) {
  std::size_t at = 0;
  for (; index > 0 && at < text.size(); --index) at = next_character(text, at);
  return at;
}

std::size_t leading_space(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t next = next_character(text, at);
    if (!is_space(text.substr(at, next - at))) break;
    at = next;
  }
  return at;
}

std::size_t trailing_space(std::string_view text) {
  std::size_t end = text.size();
  while (end > 0) {
    std::size_t begin = end - 1;
    while (begin > 0 && continues(text[begin])) --begin;
    if (!is_space(text.substr(begin, end - begin))) break;
    end = begin;
  }
  return text.size() - end;
}

}  // namespace flash_mla::text::jinja
