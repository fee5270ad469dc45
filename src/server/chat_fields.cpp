#include "server/chat_fields.h"

#include <fmt/format.h>

#include <algorithm>

#include "server/body.h"
#include "server/fields.h"
#include "server/limits.h"

namespace flash_mla::server {
namespace {

bool is_tool_name(const std::string& name) {
  const auto fits = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.';
  };
  return !name.empty() && name.size() <= kMaxToolName && std::ranges::all_of(name, fits);
}

// A tool that is well formed, without its parameters.
Tool check_tool(const Body& tool, std::size_t index) {
  const auto fail = [&](std::string_view what) {
    return bad_request(fmt::format("tools[{}]{}", index, what), "tools");
  };
  const Body* type = tool.is_object() ? find(tool, "type") : nullptr;
  if (type == nullptr || *type != "function") throw fail(".type: expected \"function\"");
  const Body* function = find(tool, "function");
  if (function == nullptr || !function->is_object()) throw fail(".function: expected an object");
  const Body* name = find(*function, "name");
  if (name == nullptr || !name->is_string() || !is_tool_name(name->get_ref<const std::string&>())) {
    throw fail(
        fmt::format(".function.name: expected 1 to {} letters, digits, \"_\", \"-\" or \".\"", kMaxToolName));
  }
  const Body* description = find(*function, "description");
  if (description != nullptr && !description->is_string()) throw fail(".function.description: expected text");
  const Body* parameters = find(*function, "parameters");
  if (parameters != nullptr && !parameters->is_object()) {
    throw fail(".function.parameters: expected a JSON schema");
  }
  Tool out{name->get<std::string>(), {}};
  read(*function, "strict", out.strict);
  return out;
}

void read_choice(const Body& body, ToolUse& use) {
  const Body* choice = find(body, "tool_choice");
  if (choice == nullptr || *choice == "auto") return;
  if (*choice == "none") {
    use.choice = ToolUse::Choice::kNone;
    return;
  }
  const Body* type = choice->is_object() ? find(*choice, "type") : nullptr;
  const Body* function = type != nullptr && *type == "function" ? find(*choice, "function") : nullptr;
  const Body* name = function != nullptr && function->is_object() ? find(*function, "name") : nullptr;
  if (*choice != "required" && (name == nullptr || !name->is_string())) {
    throw bad_request(
        "tool_choice: expected \"none\", \"auto\", \"required\" or "
        "{\"type\": \"function\", \"function\": {\"name\": ...}}",
        "tool_choice");
  }
  if (use.functions.empty()) throw bad_request("tool_choice: expected together with tools", "tool_choice");
  use.choice = ToolUse::Choice::kRequired;
  if (name != nullptr) {
    use.named = name->get<std::string>();
  } else if (use.functions.size() == 1) {
    use.named = use.functions.front().name;
  }
  if (!use.named.empty() && std::ranges::find(use.functions, use.named, &Tool::name) == use.functions.end()) {
    throw bad_request(fmt::format("tool_choice: \"{}\" is none of tools", use.named), "tool_choice");
  }
}

std::string text_of(const Body& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw wrong_type("messages", content, "a string or text parts as content");
  std::string text;
  for (const Body& part : content) {
    const Body* value = is_text(part) ? find(part, "text") : nullptr;
    if (value == nullptr || !value->is_string()) {
      throw bad_request("messages: a part of content is not text; this model reads text only", "messages");
    }
    text += value->get_ref<const std::string&>();
  }
  return text;
}

// The calls of an earlier answer, as templates read them.
Json read_calls(const Body& calls, std::size_t index) {
  const auto fail = [&](std::size_t call, std::string_view what) {
    return bad_request(fmt::format("messages[{}].tool_calls[{}]{}", index, call, what), "messages");
  };
  if (!calls.is_array()) {
    throw bad_request(
        fmt::format("messages[{}].tool_calls is {}, expected an array of calls", index, calls.type_name()),
        "messages");
  }
  Json out = Json::array();
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const Body* function = calls[i].is_object() ? find(calls[i], "function") : nullptr;
    const Body* name = function != nullptr && function->is_object() ? find(*function, "name") : nullptr;
    if (name == nullptr || !name->is_string()) throw fail(i, ".function.name: expected text");
    const Body* arguments = find(*function, "arguments");
    if (arguments != nullptr && !arguments->is_string() && !arguments->is_object()) {
      throw fail(i, ".function.arguments: expected JSON text");
    }
    const Body* id = find(calls[i], "id");
    if (id != nullptr && !id->is_string()) throw fail(i, ".id: expected text");
    const std::string text = arguments == nullptr     ? "{}"
                             : arguments->is_string() ? arguments->get<std::string>()
                                                      : arguments->dump();
    Json call = Json::object();
    if (id != nullptr) call["id"] = id->get<std::string>();
    call["type"] = "function";
    call["function"] = {{"name", name->get<std::string>()}, {"arguments", text}};
    out.push_back(std::move(call));
  }
  return out;
}

ChatMessage read_message(const Body& m, std::size_t index, bool last) {
  if (m.is_object()) refuse_unsupported_message(m, index, last);
  if (!m.is_object() || !m.contains("role") || !m["role"].is_string()) {
    throw bad_request("messages: expected objects with role and content", "messages");
  }
  ChatMessage out;
  // OpenAI's newer name of the same.
  out.role = m["role"] == "developer" ? "system" : m["role"].get<std::string>();
  Json fields = Json::object();
  for (const char* name : {"tool_call_id", "name", "reasoning", "reasoning_content"}) {
    const Body* value = find(m, name);
    if (value == nullptr) continue;
    const std::string_view given = name;
    if (!value->is_string()) {
      throw bad_request(fmt::format("messages[{}].{} is {}, expected text", index, name, value->type_name()),
                        "messages");
    }
    fields[given == "reasoning" ? "reasoning_content" : name] = value->get<std::string>();
  }
  const Body* calls = find(m, "tool_calls");
  const bool has_calls = calls != nullptr && !calls->empty();
  if (has_calls) {
    if (out.role != "assistant") {
      throw bad_request(fmt::format("messages[{}].tool_calls: only an assistant calls tools", index),
                        "messages");
    }
    fields["tool_calls"] = read_calls(*calls, index);
  }
  const Body* content = find(m, "content");
  if (content != nullptr || !has_calls) {
    if (!m.contains("content")) {
      throw bad_request("messages: expected objects with role and content", "messages");
    }
    out.content = text_of(m["content"]);
  }
  if (!fields.empty()) out.fields = dump(fields);
  return out;
}

}  // namespace

ToolUse read_tools(const Body& body, std::string_view text) {
  ToolUse use;
  const Body* tools = find(body, "tools");
  if (tools != nullptr && !tools->is_array()) throw wrong_type("tools", *tools, "an array of tools");
  if (tools != nullptr && !tools->empty()) {
    if (tools->size() > kMaxTools) {
      throw bad_request(fmt::format("tools has {} tools, expected at most {}", tools->size(), kMaxTools),
                        "tools");
    }
    for (std::size_t i = 0; i < tools->size(); ++i) use.functions.push_back(check_tool((*tools)[i], i));
    use.choice = ToolUse::Choice::kAuto;
  }
  read_choice(body, use);
  read(body, "parallel_tool_calls", use.parallel);
  if (use.choice == ToolUse::Choice::kNone) return use;
  check_width(body, "tools");
  const Json ordered = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  use.tools = dump(ordered["tools"]);
  for (std::size_t i = 0; i < use.functions.size(); ++i) {
    const Json& function = ordered["tools"][i]["function"];
    if (const auto it = function.find("parameters"); it != function.end() && it->is_object() && !it->empty())
      use.functions[i].parameters = dump(*it);
  }
  use.schemas = std::make_shared<const ToolSchemas>(ordered["tools"]);
  return use;
}

std::vector<ChatMessage> read_messages(const Body& body) {
  const Body* list = find(body, "messages");
  if (list == nullptr || !list->is_array() || list->empty()) {
    throw bad_request("messages is missing or empty, expected an array of messages", "messages");
  }
  if (list->size() > kMaxMessages) {
    throw bad_request(
        fmt::format("messages has {} messages, expected at most {}", list->size(), kMaxMessages), "messages");
  }
  std::vector<ChatMessage> out;
  for (std::size_t i = 0; i < list->size(); ++i) {
    out.push_back(read_message((*list)[i], i, i + 1 == list->size()));
  }
  return out;
}

}  // namespace flash_mla::server
