#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "flash_mla/chat.h"

namespace flash_mla::text {

/// What a system message says of tools where the chat template says nothing: their schemas and how a call is
/// written. The markers of calls are control, what the client says is not. Empty for formats whose templates
/// list the tools themselves.
std::vector<TextPart> tool_list(ToolFormat format, const nlohmann::ordered_json& tools);

}  // namespace flash_mla::text
