#pragma once

#include <string_view>

#include "flash_mla/text_format.h"

namespace flash_mla::grammar {

/// Throws InvalidArgument for a format whose source is empty or larger than the limits of text_format.h, or that
/// nests repetitions or groups beyond reason: compiling it would take more time than any text is worth.
void check_source(const TextFormat& format);

/// Of a regular expression, `where` it stands.
void check_regex(std::string_view regex, std::string_view where);

}  // namespace flash_mla::grammar
