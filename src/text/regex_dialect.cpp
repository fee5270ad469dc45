// Oniguruma's regular expressions in PCRE2's dialect. Only constructs with the same meaning in both pass;
// what is spelled otherwise is respelled, everything else is refused rather than guessed.

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"
#include "text/regex.h"
#include "text/unicode_additions.h"

namespace flash_mla::text {
namespace {

// \s in Oniguruma: Unicode's White_Space. PCRE2's has U+180E besides.
constexpr std::string_view kSpaces =
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";

class Translator {
 public:
  Translator(std::string_view pattern, std::string_view where) : pattern_(pattern), where_(where) {}

  std::string run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape(false);
      } else if (c == '[') {
        character_class();
      } else if (c == '(') {
        group();
      } else if (c == '{') {
        counted();
      } else {
        take(1);
        if (c == '*' || c == '+' || c == '?') lazy_or_possessive();
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view construct) const {
    throw Unsupported(fmt::format("{}: {} at character {}: expected what Oniguruma and PCRE2 read alike",
                                  where_, construct, at_));
  }
  bool ahead(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  void take(std::size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }

  void group() {
    for (const std::string_view opening : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!"}) {
      if (ahead(opening)) return take(opening.size());
    }
    if (ahead("(?") || ahead("(*")) refuse(fmt::format("\"{}\"", pattern_.substr(at_, 3)));
    take(1);
  }

  /// {n}, {n,} or {n,m}; any other brace is a literal in one dialect or the other.
  void counted() {
    std::size_t end = at_ + 1;
    const auto digits = [&] {
      const std::size_t begin = end;
      while (end < pattern_.size() && pattern_[end] >= '0' && pattern_[end] <= '9') ++end;
      return end > begin;
    };
    bool good = digits();
    if (good && end < pattern_.size() && pattern_[end] == ',') {
      ++end;
      digits();
    }
    good = good && end < pattern_.size() && pattern_[end] == '}';
    if (!good) refuse("\"{\" that is not {n}, {n,} or {n,m}");
    take(end + 1 - at_);
    if (ahead("+") || ahead("?") || ahead("*") || ahead("{")) refuse("a quantifier behind a quantifier");
  }

  void lazy_or_possessive() {
    if (ahead("?") || ahead("+")) take(1);
    if (ahead("*") || ahead("+") || ahead("?") || ahead("{")) refuse("a quantifier behind a quantifier");
  }

  void character_class() {
    take(1);
    if (ahead("^")) take(1);
    if (ahead("]")) refuse("\"]\" at the beginning of a class");
    while (at_ < pattern_.size() && pattern_[at_] != ']') {
      if (pattern_[at_] == '\\') {
        escape(true);
      } else if (pattern_[at_] == '[') {
        refuse("\"[\" inside a class");
      } else if (ahead("&&")) {
        refuse("\"&&\" inside a class");
      } else {
        take(1);
      }
    }
    if (at_ == pattern_.size()) refuse("a class without an end");
    take(1);
  }

  void escape(bool in_class) {
    if (at_ + 1 == pattern_.size()) refuse("\"\\\" at the end");
    const char c = pattern_[at_ + 1];
    if (c == 's') {
      out_ += in_class ? std::string(kSpaces) : fmt::format("[{}]", kSpaces);
      at_ += 2;
    } else if (c == 'S' && !in_class) {
      out_ += fmt::format("[^{}]", kSpaces);
      at_ += 2;
    } else if (c == 'p' || c == 'P') {
      property(in_class);
    } else if (c == 'x') {
      braced_code_point();
    } else if (c == 'u') {
      code_point();
    } else if (c == 'r' || c == 'n' || c == 't' || c == 'f' || punctuation(c)) {
      take(2);
    } else {
      refuse(fmt::format("\"\\{}\"", c));
    }
  }

  static bool punctuation(char c) {
    return std::string_view("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ").find(c) != std::string_view::npos;
  }

  /// The general categories L, M, N, P and S with what PCRE2's Unicode may lack of them, and Z, which has not
  /// grown.
  void property(bool in_class) {
    const std::size_t end = pattern_.find('}', at_);
    if (pattern_.substr(at_ + 2, 1) != "{" || end == std::string_view::npos) refuse("\"\\p\" without {...}");
    const std::string_view name = pattern_.substr(at_ + 3, end - at_ - 3);
    const bool negated = pattern_[at_ + 1] == 'P';
    std::string_view additions;
    bool known = name == "Z";
    for (const UnicodeAddition& a : kUnicodeAdditions) {
      if (a.category != name) continue;
      known = true;
      additions = a.ranges;
    }
    if (!known) refuse(fmt::format("\"\\p{{{}}}\", which is none of L, M, N, P, S and Z,", name));
    if (in_class && negated) refuse("\"\\P\" inside a class");
    const std::string members = fmt::format("\\p{{{}}}{}", name, additions);
    out_ += in_class ? members : fmt::format("[{}{}]", negated ? "^" : "", members);
    at_ = end + 1;
  }

  void braced_code_point() {
    const std::size_t end = pattern_.find('}', at_);
    if (pattern_.substr(at_ + 2, 1) != "{" || end == std::string_view::npos) refuse("\"\\x\" without {...}");
    take(end + 1 - at_);
  }

  void code_point() {
    const std::string_view digits = pattern_.substr(std::min(at_ + 2, pattern_.size()), 4);
    if (digits.size() != 4 || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos) {
      refuse("\"\\u\" without four hexadecimal digits");
    }
    out_ += fmt::format("\\x{{{}}}", digits);
    at_ += 6;
  }

  std::string_view pattern_;
  std::string_view where_;
  std::size_t at_ = 0;
  std::string out_;
};

}  // namespace

std::string oniguruma_to_pcre2(std::string_view pattern, std::string_view where) {
  return Translator(pattern, where).run();
}

}  // namespace flash_mla::text
