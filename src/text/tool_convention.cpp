#include "text/tool_convention.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "flash_mla/error.h"
#include "text/tool_list.h"

namespace flash_mla::text {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr std::string_view kArguments = R"({"probe_key": "probe_value"})";

bool has(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

// The prompt, or nothing if the template cannot work with the conversation.
std::string rendered(const ChatTemplate& chat, OrderedJson messages, OrderedJson variables) {
  std::string out;
  try {
    for (const TextPart& part : chat.parts(ChatInput{std::move(messages), std::move(variables)})) {
      out += part.text;
    }
  } catch (const InvalidArgument&) {
    out.clear();
  }
  return out;
}

std::string with_call(const ChatTemplate& chat, const OrderedJson& content, const OrderedJson& arguments) {
  const OrderedJson call = {{"id", "functions.probe_name:0"},
                            {"type", "function"},
                            {"function", {{"name", "probe_name"}, {"arguments", arguments}}}};
  return rendered(
      chat,
      OrderedJson::array(
          {{{"role", "user"}, {"content", "probe"}},
           {{"role", "assistant"}, {"content", content}, {"tool_calls", OrderedJson::array({call})}},
           {{"role", "tool"}, {"tool_call_id", "functions.probe_name:0"}, {"content", "probe_result"}}}),
      OrderedJson::object());
}

// Nothing lost, nothing quoted twice, and no Python where a null was.
bool is_whole(std::string_view prompt) {
  return has(prompt, "probe_name") && has(prompt, "probe_key") && has(prompt, "probe_value") &&
         has(prompt, "probe_result") && !has(prompt, "\\\"probe_key") && !has(prompt, "None");
}

ToolFormat format_of(std::string_view prompt) {
  if (has(prompt, "<｜DSML｜tool_calls>")) return ToolFormat::kDeepSeekV4;
  if (has(prompt, "<｜DSML｜function_calls>")) return ToolFormat::kDeepSeekV32;
  if (has(prompt, "function<｜tool▁sep｜>probe_name")) return ToolFormat::kDeepSeekV3;
  if (has(prompt, "probe_name<｜tool▁sep｜>")) return ToolFormat::kDeepSeekV31;
  if (has(prompt, "<|tool_call_argument_begin|>")) return ToolFormat::kKimiK2;
  if (has(prompt, "<tool_call>probe_name\n")) return ToolFormat::kGlm45;
  if (has(prompt, "<tool_call>probe_name<arg_key>")) return ToolFormat::kGlm47;
  return ToolFormat::kNone;
}

OrderedJson parse_json_as(std::string_view text, OrderedJson::value_t type, const std::string& name) {
  constexpr int kMaxDepth = 64;
  bool deep = false;
  const auto check = [&](int depth, OrderedJson::parse_event_t, OrderedJson&) {
    deep = deep || depth > kMaxDepth;
    return !deep;
  };
  OrderedJson out = OrderedJson::parse(text, check, /*allow_exceptions=*/false);
  if (deep || out.type() != type) {
    throw InvalidArgument(fmt::format("{}: expected a JSON {}, nested at most 64 deep", name,
                                      type == OrderedJson::value_t::array ? "array" : "object"));
  }
  return out;
}

void shape_arguments(OrderedJson& calls, const std::string& where) {
  if (!calls.is_array()) throw InvalidArgument(where + ": expected an array");
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const auto function = calls[i].find("function");
    if (function == calls[i].end() || !function->is_object()) continue;  // the template says what it misses
    const auto arguments = function->find("arguments");
    if (arguments == function->end() || !arguments->is_string()) continue;
    const std::string text = arguments->get<std::string>();
    *arguments = text.empty() ? OrderedJson::object()
                              : parse_json_as(text, OrderedJson::value_t::object,
                                              fmt::format("{}[{}].function.arguments", where, i));
  }
}

// Adds a message as the template wants it, where that means two messages, both.
void add_message(const ToolConvention& convention, const ChatMessage& message, std::size_t index,
                 OrderedJson& out) {
  OrderedJson json = {{"role", message.role}, {"content", message.content}};
  constexpr std::string_view kRoles[] = {"system", "user", "assistant", "tool"};
  if (std::ranges::find(kRoles, message.role) == std::end(kRoles)) {
    throw InvalidArgument(
        fmt::format("messages[{}].role = \"{}\": expected \"system\", \"user\", \"assistant\" or \"tool\"",
                    index, message.role));
  }
  if (message.role == "tool" && !convention.writes_calls) {
    throw InvalidArgument(
        fmt::format("messages[{}].role is \"tool\", which this model's chat template does not know", index));
  }
  if (message.fields.empty()) {
    out.push_back(std::move(json));
    return;
  }
  const OrderedJson fields =
      parse_json_as(message.fields, OrderedJson::value_t::object, fmt::format("messages[{}].fields", index));
  for (const auto& [name, value] : fields.items()) {
    if (name != "role" && name != "content") json[name] = value;
  }
  const auto calls = json.find("tool_calls");
  if (calls == json.end()) {
    out.push_back(std::move(json));
    return;
  }
  const std::string where = fmt::format("messages[{}].tool_calls", index);
  if (!convention.writes_calls) {
    throw InvalidArgument(where + ": this model's chat template does not write calls of tools");
  }
  if (convention.object_arguments) shape_arguments(*calls, where);
  if (message.content.empty()) {
    if (convention.null_content) json["content"] = nullptr;
  } else if (!convention.content_beside_calls) {
    OrderedJson words = json;
    words.erase("tool_calls");
    out.push_back(std::move(words));
    json["content"] = convention.null_content ? OrderedJson() : OrderedJson("");
  }
  out.push_back(std::move(json));
}

// A text that stands nowhere in the conversation, of a code point that is no character.
std::string placeholder_for(const OrderedJson& messages) {
  std::string out = "\uFDD0";
  const std::string all = messages.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
  while (has(all, out)) out += "\uFDD0";
  return out;
}

void put_into_system_message(OrderedJson& messages, const std::string& text) {
  for (OrderedJson& message : messages) {
    if (message["role"] != "system") continue;
    const std::string content = message["content"].get<std::string>();
    message["content"] = content + (content.empty() ? "" : "\n\n") + text;
    return;
  }
  const OrderedJson message = {{"role", "system"}, {"content", text}};
  messages.insert(messages.begin(), message);
}

std::vector<TextPart> replaced(std::vector<TextPart> parts, const std::string& placeholder,
                               const std::vector<TextPart>& by) {
  std::vector<TextPart> out;
  for (TextPart& part : parts) {
    std::size_t at = 0, found = 0;
    while ((found = part.text.find(placeholder, at)) != std::string::npos) {
      if (found > at) out.push_back({part.text.substr(at, found - at), part.control});
      out.insert(out.end(), by.begin(), by.end());
      at = found + placeholder.size();
    }
    if (at < part.text.size()) out.push_back({part.text.substr(at), part.control});
  }
  return out;
}

}  // namespace

ToolConvention find_tool_convention(const ChatTemplate& chat) {
  ToolConvention out;
  const OrderedJson text = kArguments, object = OrderedJson::parse(kArguments);
  for (const bool null_content : {false, true}) {
    for (const bool object_arguments : {false, true}) {
      const OrderedJson& arguments = object_arguments ? object : text;
      const std::string prompt = with_call(chat, null_content ? OrderedJson() : OrderedJson(""), arguments);
      if (out.writes_calls || !is_whole(prompt)) continue;
      out.writes_calls = true;
      out.format = format_of(prompt);
      out.null_content = null_content;
      out.object_arguments = object_arguments;
      const std::string both = with_call(chat, "probe_content", arguments);
      out.content_beside_calls = is_whole(both) && has(both, "probe_content");
    }
  }
  const OrderedJson function = {{"name", "probe_name"},
                                {"description", "probe_description"},
                                {"parameters", {{"type", "object"}, {"properties", OrderedJson::object()}}}};
  const OrderedJson tools = OrderedJson::array({{{"type", "function"}, {"function", function}}});
  const std::string listed =
      rendered(chat, OrderedJson::array({{{"role", "user"}, {"content", "probe"}}}), {{"tools", tools}});
  out.lists_tools = has(listed, "probe_name") && has(listed, "probe_description");
  return out;
}

std::vector<TextPart> chat_with_tools(const ChatTemplate& chat, const ToolConvention& convention,
                                      std::span<const ChatMessage> messages, std::string_view tools,
                                      const OrderedJson& variables, bool add_generation_prompt) {
  const bool plain = tools.empty() && std::ranges::all_of(messages, [](const ChatMessage& m) {
                       return m.fields.empty() && m.role != "tool";
                     });
  if (plain) return chat.parts(messages, add_generation_prompt, variables);
  ChatInput input;
  input.messages = OrderedJson::array();
  input.variables = variables;
  input.add_generation_prompt = add_generation_prompt;
  for (std::size_t i = 0; i < messages.size(); ++i) add_message(convention, messages[i], i, input.messages);
  if (tools.empty()) return chat.parts(input);
  const OrderedJson list = parse_json_as(tools, OrderedJson::value_t::array, "tools");
  if (convention.lists_tools) {
    input.variables["tools"] = list;
    return chat.parts(input);
  }
  const std::vector<TextPart> section = tool_list(convention.format, list);
  if (section.empty()) {
    throw Unsupported("tools: this model's chat template neither lists tools nor writes calls of them");
  }
  const std::string placeholder = placeholder_for(input.messages);
  put_into_system_message(input.messages, placeholder);
  return replaced(chat.parts(input), placeholder, section);
}

}  // namespace flash_mla::text
