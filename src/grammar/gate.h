#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "grammar/grammar.h"

namespace flash_mla::grammar {

/// Where a format does not begin at once, see TextFormat::begins_behind.
struct Gate {
  static constexpr std::size_t kMaxLineBreaks = 4;  ///< between `begins_behind` and the text

  std::string begins_behind, opened_by;
  /// Of the text behind the gate, line breaks in front of it among it.
  std::shared_ptr<const Grammar> behind;
  /// The same, or opened_by and white space before it. Null without opened_by.
  std::shared_ptr<const Grammar> first;
  std::shared_ptr<const std::vector<std::string>> bytes;  ///< by token
};

std::shared_ptr<const Grammar> make_gated(Gate gate);

}  // namespace flash_mla::grammar
