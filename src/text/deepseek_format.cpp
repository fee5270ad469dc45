#include "text/deepseek_format.h"

#include <algorithm>

#include "text/deepseek/renderer.h"

namespace flash_mla::text {

std::string_view deepseek_format_name(DeepSeekFormat format) {
  return format == DeepSeekFormat::kV32 ? "DeepSeek V3.2" : "DeepSeek V4";
}

std::vector<TextPart> render_deepseek(DeepSeekFormat format, const ChatInput& input) {
  return format == DeepSeekFormat::kV32 ? deepseek::render_v32(input) : deepseek::render_v4(input);
}

bool deepseek_format_reads(DeepSeekFormat format, std::string_view variable) {
  constexpr std::string_view kBoth[] = {"tools", "thinking", "enable_thinking", "drop_thinking"};
  return std::ranges::find(kBoth, variable) != std::end(kBoth) ||
         (format == DeepSeekFormat::kV4 && variable == "reasoning_effort");
}

}  // namespace flash_mla::text
