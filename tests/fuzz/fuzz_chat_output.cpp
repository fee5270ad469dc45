// Arbitrary bytes as what a model writes: the first says how it is read and cut. Whole and in pieces it must be the same
// answer; nothing of a text without calls is lost; a call has a name, and its pieces come in order.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "server/chat_output.h"

namespace {

using namespace flash_mla::server;
using flash_mla::ToolFormat;
using Begin = ReasoningSplitter::Begin;

void require(bool condition) {
  if (!condition) std::abort();
}

std::string read(const ChatOutputOptions& options, std::string_view text, std::size_t size) {
  ChatOutput output(options, "call_");
  std::string reasoning, content, calls;
  int last = -1;
  const auto take = [&](const ChatPiece& piece) {
    reasoning += piece.reasoning;
    content += piece.content;
    for (const ToolCallPiece& call : piece.calls) {
      if (!call.name.empty()) {
        require(call.index == ++last && !call.id.empty());
        calls += "\n" + call.id + "\n" + call.name + "\n";
      }
      require(call.index == last);
      calls += call.arguments;
    }
  };
  for (std::size_t at = 0; at < text.size(); at += size) take(output.push(text.substr(at, size)));
  take(output.finish());
  require(output.calls_tools() == (last >= 0));
  if (last < 0 && options.reasoning == Begin::kContent) require(content == text);
  return reasoning + "\n" + content + calls;
}

ChatOutputOptions options_of(std::uint8_t first) {
  static const auto schemas = std::make_shared<const ToolSchemas>(Json::parse(
      R"([{"function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}, "n": {"type": "number"}}}}}])"));
  ChatOutputOptions out;
  out.tools = tool_syntax(static_cast<ToolFormat>(first % 8));
  out.schemas = schemas;
  out.reasoning = static_cast<Begin>((first / 8) % 3);
  out.parallel = first < 240;
  if (out.tools != nullptr && out.tools->format == ToolFormat::kKimiK2)
    out.also_ends_reasoning = out.tools->section_begin;
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const ChatOutputOptions options = options_of(data[0]);
  const std::string whole = read(options, text, text.size() + 1);
  for (const std::size_t piece : {1, 2, 3, 7, 30}) require(read(options, text, piece) == whole);
  return 0;
}
