#include "text/open_end.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"

namespace flash_mla::text {

std::vector<TextPart> OpenEnd::cut(std::vector<TextPart> parts) const {
  // The last one: a template may repeat what it was given, but goes on from the final message.
  for (std::size_t i = parts.size(); i-- > 0;) {
    const std::size_t at = parts[i].text.rfind(mark);
    if (at == std::string::npos) continue;
    parts[i].text.erase(at);
    parts.resize(i + 1);
    return parts;
  }
  throw InvalidArgument(
      "continue_final_message: expected a chat template that ends with the final message's content");
}

OpenEnd mark_open_end(std::vector<ChatMessage>& messages) {
  if (messages.empty() || messages.back().role != "assistant") {
    throw InvalidArgument(
        fmt::format("continue_final_message: the last message's role is \"{}\", expected \"assistant\"",
                    messages.empty() ? "" : messages.back().role));
  }
  // Letters, so that no template strips them.
  OpenEnd end{"OPENEND"};
  const auto has_mark = [&](const ChatMessage& m) { return m.content.find(end.mark) != std::string::npos; };
  for (int i = 0; std::ranges::any_of(messages, has_mark); ++i) end.mark = fmt::format("OPENEND{}END", i);
  messages.back().content += end.mark;
  return end;
}

}  // namespace flash_mla::text
