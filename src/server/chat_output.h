#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/reasoning.h"
#include "server/tool_parser.h"

namespace flash_mla::server {

/// What the text of an answer is made of, as far as prompt and model say so.
struct ChatOutputOptions {
  ReasoningSplitter::Begin reasoning = ReasoningSplitter::Begin::kContent;
  std::string also_ends_reasoning;    ///< see ReasoningSplitter
  const ToolSyntax* tools = nullptr;  ///< null: calls of tools are not looked for
  std::shared_ptr<const ToolSchemas> schemas;
  bool parallel = true;  ///< more than one call
  std::string opening;   ///< of a call: the prompt ends with it
};

/// A piece of an answer.
struct ChatPiece {
  std::string reasoning, content;
  std::vector<ToolCallPiece> calls;
  bool empty() const { return reasoning.empty() && content.empty() && calls.empty(); }
};

/// Takes an answer's text apart: reasoning, words, calls of tools. The pieces add up to the same, whatever
/// pieces the text comes in.
class ChatOutput {
 public:
  /// `id_prefix`: of calls, see ToolParser.
  ChatOutput(const ChatOutputOptions& options, std::string id_prefix);

  ChatPiece push(std::string_view text);
  ChatPiece finish();  ///< the text ends here
  bool calls_tools() const { return tools_ && tools_->num_calls() > 0; }
  /// The one call that there may be has come: what follows is nothing to anybody.
  bool done() const { return tools_ && tools_->done(); }

 private:
  void add(ReasoningSplitter::Parts parts, ChatPiece& out);
  static void add(ToolOutput output, ChatPiece& out);

  ReasoningSplitter reasoning_;
  std::optional<ToolParser> tools_;
  std::string opening_;
};

}  // namespace flash_mla::server
