#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace flash_mla::text {

/// Turns the tokens of one continuation into text, piece by piece.
class TextDecoder {
 public:
  virtual ~TextDecoder() = default;
  /// Text that has become certain with `token`: whole UTF-8, possibly empty.
  virtual std::string push(std::int32_t token) = 0;
  /// What is left at the end.
  virtual std::string flush() = 0;
};

/// A new decoder for each continuation. Empty: there is no text.
using TextDecoderFactory = std::function<std::unique_ptr<TextDecoder>()>;

}  // namespace flash_mla::text
