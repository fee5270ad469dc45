#include "text/tool_list.h"

#include <fmt/format.h>

#include <string>

#include "text/jinja/json_text.h"

namespace flash_mla::text {
namespace {

using OrderedJson = nlohmann::ordered_json;

// DeepSeek's model card of V3.1 gives these words: what the model has learned to read.
constexpr std::string_view kRulesV31 =
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
    "<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\n"
    "Where:\n\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces\n";

// Nobody has published what V3 and R1 were trained with: the form of a call is theirs, the words are ours.
constexpr std::string_view kRulesV3 =
    "To call functions, answer with their calls, one behind the other, in exactly this form:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>function_name\n"
    "```json\n{\"parameter\": \"value\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>\n"
    "function_name must be the name of one of the functions above, and its arguments JSON that follows the "
    "function's schema of parameters. Call functions only where they help; otherwise answer in words.\n";

std::string text_of(const OrderedJson& object, const char* name) {
  const auto it = object.find(name);
  return it == object.end() || !it->is_string() ? "" : it->get<std::string>();
}

// As Python's json.dumps writes it, which is what prompts are made with.
std::string json_text(const OrderedJson& json) {
  return std::string(jinja::to_json(jinja::from_json(json), {}).view());
}

}  // namespace

std::vector<TextPart> tool_list(ToolFormat format, const OrderedJson& tools) {
  std::vector<TextPart> out;
  if (format != ToolFormat::kDeepSeekV3 && format != ToolFormat::kDeepSeekV31) return out;
  const bool v31 = format == ToolFormat::kDeepSeekV31;
  const auto own = [&](std::string_view text) { out.push_back({std::string(text), /*control=*/true}); };
  const auto client = [&](std::string text) { out.push_back({std::move(text), /*control=*/false}); };
  own(v31 ? "## Tools\nYou have access to the following tools:\n"
          : "## Tools\n\nThese functions can be called:\n");
  for (const OrderedJson& tool : tools) {
    const auto function = tool.find("function");
    const OrderedJson& f = function == tool.end() ? tool : *function;
    const auto parameters = f.find("parameters");
    own("\n### ");
    client(text_of(f, "name"));
    own("\nDescription: ");
    client(text_of(f, "description"));
    own("\n\nParameters: ");
    client(parameters == f.end() ? "{}" : json_text(*parameters));
    own("\n");
  }
  own("\n");
  own(v31 ? kRulesV31 : kRulesV3);
  return out;
}

}  // namespace flash_mla::text
