#pragma once

#include <nlohmann/json.hpp>

#include "text/jinja/value.h"

namespace flash_mla::text::jinja {

/// Strings are a client's: not control. Throws Problem for an unsigned integer past 2^63 - 1.
Value from_json(const nlohmann::ordered_json& json);

/// The same from a text. Throws Problem for one that is no JSON, or is nested more than 64 deep.
Value parse_json(std::string_view text);

struct JsonLayout {
  bool ascii = false;
  bool sorted = false;  ///< keys
  int indent = -1;      ///< spaces a level; -1: all on one line
  std::string between_items = ", ", behind_key = ": ";
};
/// As Python's json.dumps writes it; not control. Throws Problem for what JSON cannot hold.
MarkedText to_json(const Value& value, const JsonLayout& layout);

}  // namespace flash_mla::text::jinja
