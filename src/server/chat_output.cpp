#include "server/chat_output.h"

#include <utility>

namespace flash_mla::server {

ChatOutput::ChatOutput(const ChatOutputOptions& options, std::string id_prefix)
    : reasoning_(options.reasoning, options.also_ends_reasoning), opening_(options.opening) {
  if (options.tools != nullptr) {
    tools_.emplace(*options.tools, options.schemas, std::move(id_prefix), options.parallel);
  }
}

ChatPiece ChatOutput::push(std::string_view text) {
  ChatPiece out;
  if (tools_ && !opening_.empty()) add(tools_->push(std::exchange(opening_, {})), out);
  add(reasoning_.push(text), out);
  return out;
}

ChatPiece ChatOutput::finish() {
  ChatPiece out = push({});
  add(reasoning_.finish(), out);
  if (tools_) add(tools_->finish(), out);
  return out;
}

void ChatOutput::add(ReasoningSplitter::Parts parts, ChatPiece& out) {
  out.reasoning += parts.reasoning;
  if (!tools_) {
    out.content += parts.content;
  } else if (!parts.content.empty()) {
    add(tools_->push(parts.content), out);
  }
}

void ChatOutput::add(ToolOutput output, ChatPiece& out) {
  out.content += output.content;
  for (ToolCallPiece& piece : output.calls) {
    if (!out.calls.empty() && out.calls.back().index == piece.index) {
      out.calls.back().arguments += piece.arguments;
    } else {
      out.calls.push_back(std::move(piece));
    }
  }
}

}  // namespace flash_mla::server
