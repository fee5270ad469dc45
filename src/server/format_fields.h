#pragma once

#include <string>
#include <string_view>

#include "flash_mla/engine.h"
#include "server/api_error.h"

namespace flash_mla::server {

/// What a body says that the text must be, and in which field.
struct FormatField {
  TextFormat format;
  std::string name;  ///< empty: none
};

/// Reads response_format, guided_json, guided_regex, guided_choice, guided_grammar, structured_outputs, json_schema,
/// regex, grammar and ebnf, of which at most one may be given. `text` is the body: schemas keep the order of its
/// properties. Throws ApiError that names the field.
FormatField read_format(const Body& json, std::string_view text);

}  // namespace flash_mla::server
