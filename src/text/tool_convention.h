#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <vector>

#include "flash_mla/chat.h"
#include "text/chat_template.h"

namespace flash_mla::text {

/// What a chat template makes of tools, found by rendering a conversation with a call. Templates differ in
/// what they want to be given, and lose what is given in another way without a word.
struct ToolConvention {
  ToolFormat format = ToolFormat::kNone;
  bool writes_calls = false;  ///< of earlier answers, and what came of them
  /// Arguments of calls are objects, not the JSON text that OpenAI's clients send.
  bool object_arguments = false;
  bool null_content = false;          ///< of a message that has calls and no content
  bool content_beside_calls = false;  ///< one message can have both
  bool lists_tools = false;           ///< the variable "tools" is in the prompt
};

ToolConvention find_tool_convention(const ChatTemplate& chat);

/// The prompt for a conversation whose messages may have calls and which may offer tools: `tools` is a JSON
/// array in OpenAI's form, or empty. Where the template does not list them, the first system message does, in
/// the words that go with the format. Throws InvalidArgument as ChatTemplate::parts, for fields that are no
/// JSON object, and for calls that the template does not write; Unsupported for tools that cannot be listed.
std::vector<TextPart> chat_with_tools(const ChatTemplate& chat, const ToolConvention& convention,
                                      std::span<const ChatMessage> messages, std::string_view tools,
                                      const nlohmann::ordered_json& variables,
                                      bool add_generation_prompt = true);

}  // namespace flash_mla::text
