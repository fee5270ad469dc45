#pragma once

#include <cstddef>
#include <string_view>

namespace flash_mla::text::jinja {

// Characters of valid UTF-8, which are what Python's strings consist of.

/// Where the character after the one at `at` begins.
std::size_t next_character(std::string_view text, std::size_t at);
std::size_t count_characters(std::string_view text);
/// The byte at which character `index` begins; text.size() if there are fewer.
std::size_t byte_of_character(std::string_view text, std::size_t index);

/// Bytes of white space (Python's str.isspace) at the beginning of `text`, and at its end.
std::size_t leading_space(std::string_view text);
std::size_t trailing_space(std::string_view text);

}  // namespace flash_mla::text::jinja
