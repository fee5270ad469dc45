#pragma once

#include <string>

namespace flash_mla {

/// One turn of a conversation.
struct ChatMessage {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

}  // namespace flash_mla
