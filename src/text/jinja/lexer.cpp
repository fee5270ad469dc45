#include "text/jinja/lexer.h"

#include <fmt/format.h>

#include <algorithm>

#include "text/jinja/characters.h"
#include "text/utf8.h"

namespace flash_mla::text::jinja {
namespace {

using Kind = Token::Kind;

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool begins_name(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

/// One kind of line end, and not one at the very end.
std::string with_plain_lines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    const bool pair = source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n';
    if (!pair) out += source[i] == '\r' ? '\n' : source[i];
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(with_plain_lines(source)), text_(source_) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      const std::size_t tag = find_tag();
      read_data(tag);
      if (tag == text_.npos) break;
      if (text_[tag + 1] == '#') {
        read_comment();
      } else {
        read_tag();
      }
    }
    add(Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw SyntaxProblem{line_, what}; }
  void add(Kind kind, std::string_view text) { tokens_.push_back({kind, std::string(text), line_}); }
  bool at(std::string_view expected) const { return text_.substr(at_).starts_with(expected); }
  void skip(std::size_t bytes) {
    line_ += static_cast<int>(std::ranges::count(text_.substr(at_, bytes), '\n'));
    at_ += bytes;
  }

  std::size_t find_tag() const {
    for (std::size_t i = text_.find('{', at_); i < text_.size() - 1; i = text_.find('{', i + 1)) {
      if (text_[i + 1] == '{' || text_[i + 1] == '%' || text_[i + 1] == '#') return i;
    }
    return text_.npos;
  }

  /// Up to `tag`, without the white space that the tag's delimiter takes away.
  void read_data(std::size_t tag) {
    const std::string_view all = text_.substr(at_, tag == text_.npos ? text_.npos : tag - at_);
    std::string_view data = all;
    const char sign = tag != text_.npos && tag + 2 < text_.size() ? text_[tag + 2] : ' ';
    if (tag != text_.npos && sign == '-') {
      data.remove_suffix(trailing_space(data));
    } else if (tag != text_.npos && sign != '+' && text_[tag + 1] != '{') {
      const std::size_t line_end = data.rfind('\n');
      const std::size_t line = line_end == data.npos ? 0 : line_end + 1;
      if ((line > 0 || line_starts_) && leading_space(data.substr(line)) == data.size() - line)
        data = data.substr(0, line);
    }
    if (!data.empty()) add(Kind::kData, data);
    skip(all.size());
  }

  /// "-%}" takes away what white space follows, "%}" a line end; "}}" nothing.
  bool read_end(char mark, bool trims) {
    const std::string end = {mark, '}'};
    if (at("-" + end)) {
      skip(3);
      const std::size_t space = leading_space(text_.substr(at_));
      line_starts_ = space > 0 && text_[at_ + space - 1] == '\n';
      skip(space);
      return true;
    }
    const bool plus = trims && at("+" + end);
    if (!plus && !at(end)) return false;
    skip(plus ? 3 : 2);
    line_starts_ = trims && !plus && at("\n");
    if (line_starts_) skip(1);
    return true;
  }

  void read_comment() {
    const int begin = line_;
    skip(2);
    if (at("-") || at("+")) skip(1);
    while (!read_end('#', true)) {
      if (at_ >= text_.size()) throw SyntaxProblem{begin, "a comment without an end"};
      skip(1);
    }
  }

  void read_tag() {
    const bool print = text_[at_ + 1] == '{';
    add(print ? Kind::kPrintBegin : Kind::kBlockBegin, text_.substr(at_, 2));
    skip(2);
    if (at("-") || at("+")) skip(1);
    std::string open;  // brackets
    while (true) {
      skip(leading_space(text_.substr(at_)));
      if (at_ >= text_.size()) fail(print ? "\"{{\" without \"}}\"" : "\"{%\" without \"%}\"");
      if (open.empty() && read_end(print ? '}' : '%', !print)) break;
      read_expression_token(open);
    }
    tokens_.push_back({print ? Kind::kPrintEnd : Kind::kBlockEnd, print ? "}}" : "%}", tokens_.back().line});
  }

  void read_expression_token(std::string& open) {
    const char c = text_[at_];
    if (begins_name(c)) {
      std::size_t end = at_;
      while (end < text_.size() && (begins_name(text_[end]) || is_digit(text_[end]))) ++end;
      add(Kind::kName, text_.substr(at_, end - at_));
      skip(end - at_);
    } else if (is_digit(c)) {
      read_number();
    } else if (c == '\'' || c == '"') {
      read_string(c);
    } else {
      read_operator(open);
    }
  }

  void read_number() {
    std::size_t end = at_;
    const auto digits = [&] {
      while (end < text_.size() && is_digit(text_[end])) ++end;
    };
    const auto digit_at = [&](std::size_t i) { return i < text_.size() && is_digit(text_[i]); };
    digits();
    bool whole = true;
    const bool behind_dot =
        !tokens_.empty() && tokens_.back().text == "." && tokens_.back().kind == Kind::kOperator;
    if (!behind_dot && digit_at(end + 1) && text_[end] == '.') {
      whole = false;
      ++end;
      digits();
    }
    if (!behind_dot && end < text_.size() && (text_[end] == 'e' || text_[end] == 'E')) {
      const bool sign = end + 1 < text_.size() && (text_[end + 1] == '+' || text_[end + 1] == '-');
      if (digit_at(end + 1 + (sign ? 1 : 0))) {
        whole = false;
        end += sign ? 2 : 1;
        digits();
      }
    }
    if (end < text_.size() && begins_name(text_[end])) fail("a number that goes on with a letter");
    add(whole ? Kind::kInteger : Kind::kFloat, text_.substr(at_, end - at_));
    skip(end - at_);
  }

  void read_string(char quote) {
    const int begin = line_;
    std::string value;
    skip(1);
    while (true) {
      if (at_ >= text_.size()) throw SyntaxProblem{begin, "a string without an end"};
      const char c = text_[at_];
      if (c == quote) break;
      if (c == '\\') {
        read_escape(value);
      } else {
        value += c;
        skip(1);
      }
    }
    skip(1);
    tokens_.push_back({Kind::kString, std::move(value), begin});
  }

  void read_escape(std::string& value) {
    if (at_ + 1 >= text_.size()) fail("a string without an end");
    const char c = text_[at_ + 1];
    constexpr std::string_view kLetters = "abfnrtv\\'\"", kMeanings = "\a\b\f\n\r\t\v\\'\"";
    if (const std::size_t known = kLetters.find(c); known != kLetters.npos) {
      value += kMeanings[known];
      skip(2);
    } else if (c == 'x' || c == 'u' || c == 'U') {
      read_hex_escape(c == 'x' ? 2 : c == 'u' ? 4 : 8, value);
    } else if (is_digit(c) || c == 'N') {
      fail(fmt::format("the escape \"\\{}\"; expected one of \\n, \\t, \\x, \\u and their like", c));
    } else if (c == '\n') {
      skip(2);
    } else {  // stands for itself
      value += '\\';
      skip(1);
    }
  }

  void read_hex_escape(std::size_t length, std::string& value) {
    const std::string digits(text_.substr(at_ + 2, length));
    if (digits.size() < length || digits.find_first_not_of("0123456789abcdefABCDEF") != digits.npos) {
      fail(fmt::format("an escape that needs {} hexadecimal digits", length));
    }
    const unsigned long code = std::stoul(digits, nullptr, 16);
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) fail("an escape that is no Unicode character");
    append_utf8(static_cast<char32_t>(code), value);
    skip(2 + length);
  }

  void read_operator(std::string& open) {
    constexpr std::string_view kOperators[] = {"**", "//", "==", "!=", "<=", ">=", "+", "-", "*",
                                               "/",  "%",  "~",  "<",  ">",  "=",  "(", ")", "[",
                                               "]",  "{",  "}",  ",",  ":",  ".",  "|", ";"};
    const auto* op = std::ranges::find_if(kOperators, [&](std::string_view o) { return at(o); });
    if (op == std::end(kOperators))
      fail(fmt::format("the character \"{}\" in an expression",
                       text_.substr(at_, next_character(text_, at_) - at_)));
    if (*op == "(" || *op == "[" || *op == "{") {
      open += *op == "(" ? ')' : *op == "[" ? ']' : '}';
    } else if (*op == ")" || *op == "]" || *op == "}") {
      if (open.empty() || open.back() != op->front()) fail(fmt::format("\"{}\" without its beginning", *op));
      open.pop_back();
    }
    add(Kind::kOperator, *op);
    skip(op->size());
  }

  const std::string source_;
  const std::string_view text_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool line_starts_ = true;  // nothing stands before at_ in its line
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

}  // namespace flash_mla::text::jinja
