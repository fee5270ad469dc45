#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "text/jinja/value.h"

namespace flash_mla::text::jinja {

// Python's str methods on marked texts: every byte keeps its mark.

/// Without `characters` (white space, if there are none) at the chosen ends.
MarkedText stripped(const MarkedText& text, const std::optional<MarkedText>& characters, bool left,
                    bool right);
/// At `separator`, which is not empty; at most `limit` times, from the right if `from_right`. Negative: no
/// limit.
std::vector<Value> split(const MarkedText& text, std::string_view separator, std::int64_t limit,
                         bool from_right);
/// At runs of white space.
std::vector<Value> split_words(const MarkedText& text, std::int64_t limit);
std::vector<Value> split_lines(const MarkedText& text);
MarkedText replaced(const MarkedText& text, std::string_view old, const MarkedText& by, std::int64_t limit);

enum class Case { kUpper, kLower, kCapitalized, kTitle };
/// Letters of ASCII. Throws Problem for a text with others, whose case this library does not know.
MarkedText with_case(const MarkedText& text, Case to);

}  // namespace flash_mla::text::jinja
