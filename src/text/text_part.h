#pragma once

#include <string>

namespace flash_mla::text {

/// A piece of a text that is tokenized as a whole.
struct TextPart {
  std::string text;
  /// Added tokens (special or not) that it spells out become those tokens. Text of a user has this false:
  /// what it spells out, alone or together with its surroundings, stays ordinary text.
  bool control = false;
};

}  // namespace flash_mla::text
