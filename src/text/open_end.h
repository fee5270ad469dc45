#pragma once

#include <string>
#include <vector>

#include "flash_mla/chat.h"
#include "text/text_part.h"

namespace flash_mla::text {

/// The end of a final message that a template is not to close: a mark that no message has, appended to it.
struct OpenEnd {
  std::string mark;

  /// What a template has made of the messages, up to the mark. Throws InvalidArgument if the template has left it
  /// out.
  std::vector<TextPart> cut(std::vector<TextPart> parts) const;
};

/// Appends the mark to the last message. Throws InvalidArgument if that is not the assistant's.
OpenEnd mark_open_end(std::vector<ChatMessage>& messages);

}  // namespace flash_mla::text
