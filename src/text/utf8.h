#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace flash_mla::text {

/// `text` if it is UTF-8; else a copy, in `storage`, with U+FFFD for every maximal invalid part (Unicode
/// standard, section 3.9, "U+FFFD Substitution of Maximal Subparts", as Python and Rust do it).
std::string_view replace_invalid_utf8(std::string_view text, std::string& storage);

/// Bytes at the end of `text` (0 to 3) that begin a UTF-8 sequence which more bytes could complete.
std::size_t incomplete_utf8_suffix(std::string_view text);

/// Appends the UTF-8 of a code point.
void append_utf8(char32_t code_point, std::string& out);

/// The code points of valid UTF-8.
std::u32string utf8_to_code_points(std::string_view text);

}  // namespace flash_mla::text
