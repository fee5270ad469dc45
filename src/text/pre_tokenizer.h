#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/regex.h"

namespace flash_mla::text {

/// Cuts a text into the words that BPE sees: one regular expression after another, each on the pieces that
/// the one before has left. The bytes of a text are those of its words.
class PreTokenizer {
 public:
  /// From "pre_tokenizer" of a tokenizer.json: a ByteLevel, or a Sequence of Split and Digits that ends with
  /// one. Throws Unsupported, naming what else is asked for.
  static PreTokenizer parse(const JsonObject& json);

  /// `text` is valid UTF-8. Throws InvalidArgument if an expression cannot be run on it.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  void add(const JsonObject& json, bool last);

  std::vector<Regex> expressions_;
};

}  // namespace flash_mla::text
