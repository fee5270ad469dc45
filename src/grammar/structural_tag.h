#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/text_format.h"

namespace flash_mla::grammar {

/// A format with calls as XGrammar's structural tag, in JSON. Throws as Compiler::compile.
std::string structural_tag(const TextFormat& format);

/// White space between the parts of a JSON text. Without a bound a model that likes blanks never comes to its end.
inline constexpr int kMaxJsonBlanks = 16;

/// A text, and one of the choices, in the notation of grammars. Throws Unsupported for control characters.
std::string grammar_literal(std::string_view text);
std::string alternatives(const std::vector<std::string>& choices);

}  // namespace flash_mla::grammar
