#pragma once

#include <string>

namespace flash_mla {

/// One turn of a conversation.
struct ChatMessage {
  std::string role;  ///< "system", "user", "assistant" or "tool"
  std::string content;
  /// What else the chat template sees of it: a JSON object in OpenAI's form, such as {"tool_calls": [...]},
  /// {"tool_call_id": "..."} or {"reasoning_content": "..."}, without role and content. Empty: nothing.
  std::string fields = {};
};

/// A piece of a text that is tokenized as a whole.
struct TextPart {
  std::string text;
  /// Added tokens (special or not) that it spells out become those tokens. Text of a user has this false:
  /// what it spells out, alone or together with its surroundings, stays ordinary text.
  bool control = false;
};

/// How a model writes calls of tools, by the names under which vLLM's users know them.
enum class ToolFormat {
  kNone,
  kDeepSeekV3,
  kDeepSeekV31,
  kDeepSeekV32,
  kDeepSeekV4,
  kGlm45,
  kGlm47,
  kKimiK2
};
/// "none", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "glm45", "glm47", "kimi_k2".
const char* tool_format_name(ToolFormat format);

}  // namespace flash_mla
