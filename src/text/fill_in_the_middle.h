#pragma once

#include <string_view>
#include <vector>

#include "text/text_part.h"
#include "text/tokenizer.h"

namespace flash_mla::text {

/// The prompt that asks for what stands between `prefix` and `suffix`, for Tokenizer::encode_parts, by the
/// tokens that the vocabulary has for it. Throws Unsupported if it has none that are known.
std::vector<TextPart> fill_in_the_middle(const Tokenizer& tokenizer, std::string_view prefix,
                                         std::string_view suffix);

}  // namespace flash_mla::text
