#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::text::jinja {

struct Token {
  enum class Kind {
    kData,
    kBlockBegin,
    kBlockEnd,
    kPrintBegin,
    kPrintEnd,
    kName,
    kString,
    kInteger,
    kFloat,
    kOperator,
    kEnd
  };
  Kind kind;
  std::string text;  ///< of a string: what it stands for
  int line;
};

/// Cuts a template into tokens, with white space around tags as transformers asks Jinja for it: trim_blocks
/// and lstrip_blocks, "-" and "+" at the delimiters. Throws SyntaxProblem.
std::vector<Token> tokenize(std::string_view source);

/// What a template has that this library does not understand, and where.
struct SyntaxProblem {
  int line;
  std::string what;
};

}  // namespace flash_mla::text::jinja
