#pragma once

#include <string_view>
#include <vector>

#include "text/text_part.h"

namespace flash_mla::text {

struct ChatInput;

/// Prompt formats that checkpoints publish as code, without a chat template.
enum class DeepSeekFormat { kV32, kV4 };
/// "DeepSeek V3.2", "DeepSeek V4".
std::string_view deepseek_format_name(DeepSeekFormat format);

/// The prompt for a conversation. Of its variables it reads "tools" (which stand behind the first system
/// message), "thinking" or "enable_thinking" (false), "drop_thinking" (true: reasoning of answers before the last
/// user's message is left out) and, V4, "reasoning_effort" ("high" or "max"); of its messages what the formats'
/// code reads: role, content, tools, response_format, tool_calls, reasoning_content or reasoning; V4: also
/// tool_call_id, wo_eos and task. Roles are system, developer, user, assistant and tool; V4: also
/// latest_reminder. What the messages and variables say is never control. Throws InvalidArgument that names
/// the field.
std::vector<TextPart> render_deepseek(DeepSeekFormat format, const ChatInput& input);

/// Whether the format looks at a variable of this name.
bool deepseek_format_reads(DeepSeekFormat format, std::string_view variable);

}  // namespace flash_mla::text
