#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace flash_mla::text {

// GPT-2's alphabet of bytes, in which byte-level tokenizers spell their tokens: bytes that print in Latin-1
// stand for themselves, the others for U+0100 and up in their order.

/// The letter of a byte, in UTF-8.
std::string byte_letter(unsigned char byte);

/// The bytes that a word of such letters stands for; nothing if any character of `word` is no letter.
std::optional<std::string> letters_to_bytes(std::string_view word);

}  // namespace flash_mla::text
