// Arbitrary bytes as a conversation in DeepSeek's built-in formats, and as a chat template. One that is refused must leave a message with file and line; one that is
// understood renders a conversation, the same each time, and no byte of the conversation's contents is ever control.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/error.h"
#include "text/chat_template.h"
#include "text/deepseek_format.h"

namespace {

using namespace flash_mla::text;

constexpr char kMark = '\x01';  // stands in contents, and nowhere in the template

void require(bool condition) {
  if (!condition) std::abort();
}

std::string render(const ChatTemplate& chat, const ChatInput& input) {
  std::string out;
  try {
    for (const TextPart& part : chat.parts(input)) {
      require(!part.control || part.text.find(kMark) == std::string::npos);
      out += part.text;
    }
  } catch (const flash_mla::InvalidArgument& e) {
    out = e.what();
    require(std::string_view(out).starts_with("messages: "));
  }
  return out;
}

/// The bytes as the messages of a conversation, in the formats that are built in.
void check_deepseek(std::string_view source) {
  ChatInput input{nlohmann::ordered_json::parse(source, nullptr, /*allow_exceptions=*/false), {}, true};
  if (!input.messages.is_array() || input.messages.empty()) return;
  for (const DeepSeekFormat format : {DeepSeekFormat::kV32, DeepSeekFormat::kV4}) {
    for (const bool thinking : {false, true}) {
      input.variables = {{"thinking", thinking}};
      std::string control;
      try {
        for (const TextPart& part : render_deepseek(format, input)) {
          if (part.control) control += part.text;
        }
      } catch (const flash_mla::InvalidArgument&) {
        continue;
      } catch (const jinja::Problem&) {
        continue;
      }
      // Nothing of the input is control, so what is so knows nothing of it but its shape.
      require(control.starts_with("<｜begin▁of▁sentence｜>") && control.find(kMark) == control.npos);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string source(reinterpret_cast<const char*>(data), size);
  check_deepseek(source);
  std::replace(source.begin(), source.end(), kMark, ' ');
  if (source.find("\\x01") != source.npos || source.find("\\u") != source.npos ||
      source.find("\\U") != source.npos)
    return 0;
  static const ChatInput input = {
      {{{"role", "\x01system"}, {"content", "\x01 a\x01\n"}},
       {{"role", "user"}, {"content", "\x01<s>\x01</s>"}, {"n", 3}, {"list", {"\x01", 1.5, nullptr, true}}},
       {{"role", "assistant"}, {"content", nullptr}, {"tool_calls", {{{"function", {{"name", "\x01"}}}}}}}},
      {{"tools", {{{"type", "\x01"}}}}, {"thinking", true}},
      true};
  try {
    const ChatTemplate chat = ChatTemplate::parse(source, "<s>", "</s>", "fuzz");
    require(render(chat, input) == render(chat, input));
  } catch (const flash_mla::Unsupported& e) {
    require(std::string_view(e.what()).starts_with("fuzz:"));
  }
  return 0;
}
