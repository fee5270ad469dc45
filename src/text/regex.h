#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::text {

/// A regular expression of a tokenizer.json, which is in Oniguruma's dialect, run by PCRE2 (compiled to
/// machine code where PCRE2 can). Immutable; any number of threads may use one object.
class Regex {
 public:
  /// `where` names the file and field in errors. Throws InvalidArgument for a malformed expression,
  /// Unsupported for one that the two dialects may read differently or that matches the empty string.
  Regex(std::string_view pattern, std::string where);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  /// Cuts `text`, valid UTF-8, into its matches and what lies between them, and appends these pieces in
  /// order. Throws InvalidArgument if PCRE2 gives up.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// `pattern` in PCRE2's dialect. Throws Unsupported, naming the construct.
std::string oniguruma_to_pcre2(std::string_view pattern, std::string_view where);

}  // namespace flash_mla::text
