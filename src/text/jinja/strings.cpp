#include "text/jinja/strings.h"

#include <algorithm>

#include "text/jinja/characters.h"

namespace flash_mla::text::jinja {
namespace {

bool is_one_of(std::string_view character, std::string_view set) {
  for (std::size_t at = 0; at < set.size();) {
    const std::size_t next = next_character(set, at);
    if (set.substr(at, next - at) == character) return true;
    at = next;
  }
  return false;
}

bool begins_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }

}  // namespace

MarkedText stripped(const MarkedText& text, const std::optional<MarkedText>& characters, bool left,
                    bool right) {
  const std::string_view all = text.view();
  std::size_t begin = 0, end = all.size();
  if (!characters) {
    if (left) begin = leading_space(all);
    if (right && begin < end) end -= trailing_space(all);
    return text.slice(begin, end);
  }
  const std::string_view set = characters->view();
  while (left && begin < end) {
    const std::size_t next = next_character(all, begin);
    if (!is_one_of(all.substr(begin, next - begin), set)) break;
    begin = next;
  }
  while (right && begin < end) {
    std::size_t last = end - 1;
    while (last > begin && !begins_character(all[last])) --last;
    if (!is_one_of(all.substr(last, end - last), set)) break;
    end = last;
  }
  return text.slice(begin, end);
}

std::vector<Value> split(const MarkedText& text, std::string_view separator, std::int64_t limit,
                         bool from_right) {
  if (separator.empty()) throw Problem{"split at an empty separator"};
  const std::string_view all = text.view();
  std::vector<Value> out;
  if (from_right) {
    std::size_t end = all.size();
    while (limit < 0 || static_cast<std::int64_t>(out.size()) < limit) {
      if (end < separator.size()) break;
      const std::size_t at = all.rfind(separator, end - separator.size());
      if (at == all.npos) break;
      out.push_back(text.slice(at + separator.size(), end));
      end = at;
    }
    out.push_back(text.slice(0, end));
    std::ranges::reverse(out);
    return out;
  }
  std::size_t begin = 0;
  while (limit < 0 || static_cast<std::int64_t>(out.size()) < limit) {
    const std::size_t at = all.find(separator, begin);
    if (at == all.npos) break;
    out.push_back(text.slice(begin, at));
    begin = at + separator.size();
  }
  out.push_back(text.slice(begin, all.size()));
  return out;
}

std::vector<Value> split_words(const MarkedText& text, std::int64_t limit) {
  const std::string_view all = text.view();
  std::vector<Value> out;
  std::size_t begin = leading_space(all);
  while (begin < all.size()) {
    if (limit >= 0 && static_cast<std::int64_t>(out.size()) >= limit) {
      out.push_back(text.slice(begin, all.size() - trailing_space(all)));
      break;
    }
    std::size_t end = begin;
    while (end < all.size() && leading_space(all.substr(end, next_character(all, end) - end)) == 0) {
      end = next_character(all, end);
    }
    out.push_back(text.slice(begin, end));
    begin = end + leading_space(all.substr(end));
  }
  return out;
}

std::vector<Value> split_lines(const MarkedText& text) {
  constexpr std::string_view kEnds[] = {"\r\n", "\n",   "\r",     "\v",     "\f",    "\x1c",
                                        "\x1d", "\x1e", "\u0085", "\u2028", "\u2029"};
  const std::string_view all = text.view();
  std::vector<Value> out;
  std::size_t begin = 0;
  for (std::size_t at = 0; at < all.size();) {
    const auto* end =
        std::ranges::find_if(kEnds, [&](std::string_view e) { return all.substr(at).starts_with(e); });
    if (end == std::end(kEnds)) {
      at = next_character(all, at);
      continue;
    }
    out.push_back(text.slice(begin, at));
    at += end->size();
    begin = at;
  }
  if (begin < all.size()) out.push_back(text.slice(begin, all.size()));
  return out;
}

MarkedText replaced(const MarkedText& text, std::string_view old, const MarkedText& by, std::int64_t limit) {
  const std::string_view all = text.view();
  MarkedText out;
  std::size_t begin = 0;
  for (std::int64_t n = 0; limit < 0 || n < limit; ++n) {
    // An empty one is found before every character, and at the end.
    const std::size_t from =
        old.empty() && n > 0 ? (begin < all.size() ? next_character(all, begin) : all.npos) : begin;
    const std::size_t at = from > all.size() ? all.npos : all.find(old, from);
    if (at == all.npos) break;
    out.append(text.slice(begin, at));
    out.append(by);
    begin = at + old.size();
  }
  out.append(text.slice(begin, all.size()));
  return out;
}

MarkedText with_case(const MarkedText& text, Case to) {
  MarkedText out;
  bool within = false;  // a word, or the text
  text.for_each_run([&](std::string_view run, bool control) {
    std::string cased(run);
    for (char& c : cased) {
      if (static_cast<unsigned char>(c) >= 0x80) throw Problem{"the case of letters outside ASCII"};
      const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
      const bool upper = to == Case::kUpper || (to != Case::kLower && !within);
      if (letter) c = static_cast<char>(upper ? c & ~0x20 : c | 0x20);
      within = to == Case::kTitle ? letter : true;
    }
    out.append(MarkedText(cased, control));
  });
  return out;
}

}  // namespace flash_mla::text::jinja
