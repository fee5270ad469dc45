#include "grammar/source_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <string>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla::grammar {
namespace {

constexpr int kMaxGroups = 64;  // nested: compilers recurse

void check_size(const char* what, std::size_t size, std::size_t most) {
  if (size == 0) throw InvalidArgument(fmt::format("{} is empty", what));
  if (size > most)
    throw InvalidArgument(fmt::format("{} has {} bytes, expected at most {}", what, size, most));
}

// The larger bound of "{m,n}" behind `at`; 0 if that is no repetition.
int repetitions(std::string_view text, std::size_t& at) {
  long long most = 0, number = 0;
  bool digits = false;
  for (std::size_t i = at; i < text.size(); ++i) {
    const char c = text[i];
    if (std::isdigit(static_cast<unsigned char>(c)) != 0) {
      number = std::min(number * 10 + (c - '0'), 1LL << 40);
      digits = true;
    } else if (c == ',' || c == '}') {
      most = std::max(most, number);
      number = 0;
      if (c == ',') continue;
      at = i;
      return digits ? static_cast<int>(std::min(most, 1LL << 30)) : 0;
    } else if (c != ' ') {
      return 0;
    }
  }
  return 0;
}

/// Follows groups and repetitions of a regular expression or of a grammar's rule: what a group repeats counts as
/// often as the group does.
class Size {
 public:
  explicit Size(std::string_view where) : where_(where) {}

  void open() {
    if (std::ssize(groups_) > kMaxGroups) {
      throw InvalidArgument(fmt::format("{}: groups are nested more than {} deep", where_, kMaxGroups));
    }
    groups_.push_back(0);
    last_ = 0;
  }
  void close() {
    if (groups_.size() < 2) return;  // the compiler will say what is wrong
    last_ = std::max(groups_.back(), 1LL);
    groups_.pop_back();
    groups_.back() += last_;
  }
  void item() {
    last_ = 1;
    ++groups_.back();
  }
  void repeat(int count) {
    groups_.back() += last_ * (count - 1);
    last_ *= count;
    check();
  }
  void check() const {
    if (groups_.back() <= kMaxItems) return;
    throw InvalidArgument(fmt::format(
        "{}: repetitions make it longer than {} characters or groups; expected less", where_, kMaxItems));
  }

 private:
  static constexpr long long kMaxItems = 4LL * kMaxRepetitions;

  std::string where_;
  std::vector<long long> groups_{0};
  long long last_ = 0;
};

// The end of a quoted string or a class of characters that begins at `at`.
std::size_t end_of(std::string_view text, std::size_t at, char end) {
  for (std::size_t i = at + 1; i < text.size(); ++i) {
    if (text[i] == '\\') {
      ++i;
    } else if (text[i] == end) {
      return i;
    }
  }
  return text.size();
}

void measure(std::string_view text, std::string_view where, bool regex) {
  Size size(where);
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\\') {
      ++i;
      size.item();
    } else if (c == '[') {
      i = end_of(text, i, ']');
      size.item();
    } else if (c == '"' && !regex) {
      i = end_of(text, i, '"');
      size.item();
    } else if (c == '#' && !regex) {
      i = std::min(text.find('\n', i), text.size());
    } else if (c == '(') {
      size.open();
    } else if (c == ')') {
      size.close();
    } else if (c == '{') {
      std::size_t at = i + 1;
      const int count = repetitions(text, at);
      if (count > kMaxRepetitions) {
        throw InvalidArgument(
            fmt::format("{}: a repetition of {}, expected at most {}", where, count, kMaxRepetitions));
      }
      if (count > 0) {
        size.repeat(count);
        i = at;
      }
    } else if (regex || std::isspace(static_cast<unsigned char>(c)) == 0) {
      size.item();
    }
  }
}

}  // namespace

void check_regex(std::string_view regex, std::string_view where) {
  if (regex.size() > kMaxRegexBytes) {
    throw InvalidArgument(
        fmt::format("{} has {} bytes, expected at most {}", where, regex.size(), kMaxRegexBytes));
  }
  measure(regex, where, /*regex=*/true);
}

namespace {

void check_calls(const CallNotation& calls) {
  std::size_t size = 0;
  for (const CallNotation::Function& function : calls.functions)
    size += function.begin.size() + function.parameters.size();
  if (!calls.functions.empty()) check_size("calls", size, kMaxFormatBytes);
}

}  // namespace

void check_source(const TextFormat& format) {
  check_calls(format.calls);
  using Kind = TextFormat::Kind;
  switch (format.kind) {
    case Kind::kFree:
    case Kind::kJsonObject:
      return;
    case Kind::kJsonSchema:
      return check_size("json_schema", format.source.size(), kMaxFormatBytes);
    case Kind::kRegex:
      check_size("regex", format.source.size(), kMaxRegexBytes);
      return check_regex(format.source, "regex");
    case Kind::kGrammar:
      check_size("grammar", format.source.size(), kMaxFormatBytes);
      return measure(format.source, "grammar", /*regex=*/false);
    case Kind::kChoice: {
      std::size_t size = 0;
      for (const std::string& choice : format.choices) {
        check_size("choice", choice.size(), kMaxFormatBytes);
        size += choice.size();
      }
      check_size("choice", size, kMaxFormatBytes);
    }
  }
}

}  // namespace flash_mla::grammar
