#include "server/messages_request.h"

#include <fmt/format.h>

#include <algorithm>

#include "server/limits.h"

namespace flash_mla::server {
namespace {

// Of this API, and what would mean something else in a chat.
constexpr const char* kUnsupported[] = {"container",
                                        "mcp_servers",
                                        "context_management",
                                        "output_config",
                                        "output_format",
                                        "n",
                                        "best_of",
                                        "stop",
                                        "logprobs",
                                        "top_logprobs",
                                        "stream_options",
                                        "response_format",
                                        "functions",
                                        "max_completion_tokens",
                                        "include_stop_str_in_output"};

// Read here, or without effect: prompts are cached without being asked.
constexpr const char* kOwn[] = {"system",   "messages", "stop_sequences", "tools",         "tool_choice",
                                "thinking", "metadata", "service_tier",   "inference_geo", "cache_control"};

ApiError not_supported(const std::string& name) {
  return bad_request(fmt::format("{} is not supported by this server", name),
                     name.substr(0, name.find_first_of("[.")));
}

const Json& text_field(const Json& block, const char* key, const std::string& where) {
  const Json* value = find(block, key);
  if (value == nullptr || !value->is_string()) {
    throw bad_request(fmt::format("{}.{}: expected text", where, key), "messages");
  }
  return *value;
}

/// A message of blocks: text, calls of tools (of an assistant), results of calls (of a user, which are messages
/// of their own in a chat and come first).
void add_blocks(const Json& blocks, const std::string& role, const std::string& where, Json& messages) {
  Json message = {{"role", role}, {"content", ""}};
  std::string text;
  bool has_text = false;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const std::string here = fmt::format("{}.content[{}]", where, i);
    const Json& block = blocks[i];
    if (!block.is_object()) throw bad_request(here + ": expected an object", "messages");
    const std::string type = text_field(block, "type", here).get<std::string>();
    if (type == "text") {
      text += text_field(block, "text", here).get<std::string>();
      has_text = true;
    } else if (type == "tool_use" && role == "assistant") {
      const Json* input = find(block, "input");
      if (input == nullptr || !input->is_object())
        throw bad_request(here + ".input: expected an object", "messages");
      message["tool_calls"].push_back(
          {{"id", text_field(block, "id", here)},
           {"type", "function"},
           {"function", {{"name", text_field(block, "name", here)}, {"arguments", input->dump()}}}});
    } else if (type == "tool_result" && role == "user") {
      const Json* content = find(block, "content");
      messages.push_back(
          {{"role", "tool"},
           {"tool_call_id", text_field(block, "tool_use_id", here)},
           {"content",
            content == nullptr ? std::string() : text_of_parts(*content, here + ".content", {"text"})}});
    } else if (!(type.ends_with("thinking") &&
                 role == "assistant")) {  // which belongs to its own answer only
      throw not_supported(fmt::format("messages: {} of type \"{}\" in a message of role {}", here,
                                      type.substr(0, kMaxLoggedBytes), role));
    }
  }
  const bool calls = message.contains("tool_calls");
  if (!has_text && !calls && role == "user") return;  // nothing but results
  message["content"] = calls && !has_text ? Json() : Json(text);
  messages.push_back(std::move(message));
}

Json read_conversation(const Json& asked) {
  Json messages = Json::array();
  if (const Json* system = find(asked, "system")) {
    messages.push_back({{"role", "system"}, {"content", text_of_parts(*system, "system", {"text"})}});
  }
  const Json* list = find(asked, "messages");
  if (list == nullptr || !list->is_array() || list->empty()) {
    throw bad_request("messages is missing or empty, expected an array of messages", "messages");
  }
  for (std::size_t i = 0; i < list->size(); ++i) {
    const std::string where = fmt::format("messages[{}]", i);
    const Json& m = (*list)[i];
    const Json* role = m.is_object() ? find(m, "role") : nullptr;
    if (role == nullptr || (*role != "user" && *role != "assistant")) {
      throw bad_request(where + ".role: expected \"user\" or \"assistant\"", "messages");
    }
    const Json* content = find(m, "content");
    if (content == nullptr || (!content->is_string() && !content->is_array())) {
      throw bad_request(where + ".content: expected text or blocks", "messages");
    }
    if (content->is_string()) {
      messages.push_back({{"role", *role}, {"content", *content}});
    } else {
      add_blocks(*content, role->get<std::string>(), where, messages);
    }
  }
  return messages;
}

Json read_tools(const Json& tools) {
  if (!tools.is_array()) throw bad_request("tools: expected an array of tools", "tools");
  Json out = Json::array();
  for (std::size_t i = 0; i < tools.size(); ++i) {
    const Json& tool = tools[i];
    const Json* type = tool.is_object() ? find(tool, "type") : nullptr;
    if (!tool.is_object() || (type != nullptr && *type != "custom")) {
      throw not_supported(fmt::format("tools[{}]: a tool of the server's own", i));
    }
    Json function = Json::object();
    for (const auto& [from, to] : {std::pair{"name", "name"}, std::pair{"description", "description"},
                                   std::pair{"input_schema", "parameters"}}) {
      if (const Json* value = find(tool, from)) function[to] = *value;
    }
    out.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return out;
}

void read_tool_choice(const Json& choice, Json& chat) {
  const Json* type = choice.is_object() ? find(choice, "type") : nullptr;
  if (type != nullptr && *type == "tool") {
    const Json* name = find(choice, "name");
    if (name == nullptr) throw bad_request("tool_choice.name is missing", "tool_choice");
    chat["tool_choice"] = {{"type", "function"}, {"function", {{"name", *name}}}};
  } else if (type != nullptr && (*type == "auto" || *type == "none")) {
    chat["tool_choice"] = *type;
  } else if (type != nullptr && *type == "any") {
    chat["tool_choice"] = "required";
  } else {
    throw bad_request("tool_choice.type: expected \"auto\", \"any\", \"tool\" or \"none\"", "tool_choice");
  }
  if (const Json* one = find(choice, "disable_parallel_tool_use"); one != nullptr && *one == true) {
    chat["parallel_tool_calls"] = false;
  }
}

void read_thinking(const Json& thinking, Json& chat) {
  const Json* type = thinking.is_object() ? find(thinking, "type") : nullptr;
  if (type == nullptr || (*type != "enabled" && *type != "disabled" && *type != "adaptive")) {
    throw bad_request("thinking.type: expected \"enabled\", \"adaptive\" or \"disabled\"", "thinking");
  }
  if (*type == "enabled") chat["thinking"] = {{"type", "enabled"}};
  // Obeyed by the templates that have a switch; the others know of no reasoning, or of nothing else.
  if (*type == "disabled") chat["chat_template_kwargs"] = {{"thinking", false}, {"enable_thinking", false}};
}

std::vector<std::string> read_stops(const Json& stops) {
  if (!stops.is_array()) throw bad_request("stop_sequences: expected an array of texts", "stop_sequences");
  std::vector<std::string> out;
  for (const Json& stop : stops) {
    if (!stop.is_string() || stop == "") {
      throw bad_request("stop_sequences: expected texts that are not empty", "stop_sequences");
    }
    out.push_back(stop.get<std::string>());
  }
  return out;
}

}  // namespace

MessagesRequest read_messages_request(std::string_view body, bool counts) {
  MessagesRequest out;
  const Json asked = parse_ordered(body);
  for (const char* name : kUnsupported) {
    if (find(asked, name) != nullptr) throw not_supported(name);
  }
  const Json* most = find(asked, "max_tokens");
  if (!counts && (most == nullptr || !most->is_number_integer() || *most < 1)) {
    throw bad_request("max_tokens is missing or less than 1, expected the tokens of the answer at most",
                      "max_tokens");
  }
  // What is not this API's own means the same in a chat, or is refused there.
  for (const auto& [name, value] : asked.items()) {
    if (std::ranges::find(kOwn, name) == std::end(kOwn) && !value.is_null()) out.chat[name] = value;
  }
  out.chat["messages"] = read_conversation(asked);
  if (out.chat["messages"].back()["role"] == "assistant") {  // the answer goes on behind it
    out.chat["continue_final_message"] = true;
    out.chat["add_generation_prompt"] = false;
  }
  if (const Json* tools = find(asked, "tools")) out.chat["tools"] = read_tools(*tools);
  if (const Json* choice = find(asked, "tool_choice")) read_tool_choice(*choice, out.chat);
  if (const Json* thinking = find(asked, "thinking")) read_thinking(*thinking, out.chat);
  if (const Json* stops = find(asked, "stop_sequences")) {
    out.stops = read_stops(*stops);
    out.chat["stop"] = out.stops;
    out.chat["include_stop_str_in_output"] = true;  // says which it was
  }
  return out;
}

}  // namespace flash_mla::server
