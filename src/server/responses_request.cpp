#include "server/responses_request.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "server/limits.h"
#include "server/response_store.h"

namespace flash_mla::server {
namespace {

bool asks_nothing(const Json& v) {
  return v.is_null() || v == false || (v.is_structured() && v.empty()) || (v.is_string() && v == "");
}

// Of this API, and what would mean something else in a chat.
constexpr const char* kUnsupported[] = {
    "background", "conversation",   "context_management", "max_tool_calls",
    "prompt",     "top_logprobs",   "messages",           "n",
    "best_of",    "logprobs",       "max_tokens",         "max_completion_tokens",
    "functions",  "response_format"};

// Read here, or without effect.
constexpr const char* kOwn[] = {"input",   "instructions",  "previous_response_id", "store",     "text",
                                "tools",   "tool_choice",   "max_output_tokens",    "reasoning", "truncation",
                                "include", "stream_options"};

ApiError not_supported(const std::string& name) {
  return bad_request(fmt::format("{} is not supported by this server", name),
                     name.substr(0, name.find_first_of("[.")));
}

const Json& text_field(const Json& item, const char* key, const std::string& where) {
  const Json* value = find(item, key);
  if (value == nullptr || !value->is_string()) {
    throw bad_request(fmt::format("{}.{}: expected text", where, key), "input");
  }
  return *value;
}

/// Appends what an item of `input` says to a chat's messages.
void add_item(const Json& item, const std::string& where, Json& messages) {
  if (!item.is_object()) throw bad_request(where + ": expected an object", "input");
  const Json* type = find(item, "type");
  if (type != nullptr && !type->is_string()) throw bad_request(where + ".type: expected text", "input");
  const std::string kind = type == nullptr ? "message" : type->get<std::string>();
  if (kind == "message") {
    const Json* content = find(item, "content");
    if (content == nullptr) throw bad_request(where + ".content is missing, expected text or parts", "input");
    messages.push_back(
        {{"role", text_field(item, "role", where)},
         {"content", text_of_parts(*content, where + ".content", {"input_text", "output_text", "text"})}});
  } else if (kind == "function_call") {
    // One answer of the model may have several.
    const bool joins = !messages.empty() && messages.back()["role"] == "assistant";
    if (!joins) messages.push_back({{"role", "assistant"}, {"content", nullptr}});
    messages.back()["tool_calls"].push_back(
        {{"id", text_field(item, "call_id", where)},
         {"type", "function"},
         {"function",
          {{"name", text_field(item, "name", where)}, {"arguments", text_field(item, "arguments", where)}}}});
  } else if (kind == "function_call_output") {
    const Json* output = find(item, "output");
    if (output == nullptr) throw bad_request(where + ".output is missing, expected text or parts", "input");
    messages.push_back(
        {{"role", "tool"},
         {"tool_call_id", text_field(item, "call_id", where)},
         {"content", text_of_parts(*output, where + ".output", {"input_text", "output_text", "text"})}});
  } else if (kind != "reasoning") {  // which belongs to its own answer only
    throw not_supported(fmt::format("{}.type \"{}\"", where, kind.substr(0, kMaxLoggedBytes)));
  }
}

Json read_conversation(const Json& asked, ResponseStore& store) {
  Json messages = Json::array();
  if (const Json* previous = find(asked, "previous_response_id")) {
    if (!previous->is_string())
      throw bad_request("previous_response_id: expected text", "previous_response_id");
    const std::optional<std::string> kept = store.get(previous->get<std::string>());
    if (!kept) {
      throw ApiError(
          400, "invalid_request_error",
          fmt::format("previous_response_id: no response \"{}\" is kept here; the latest {} are",
                      previous->get<std::string>().substr(0, kMaxLoggedBytes), kMaxStoredResponses),
          "previous_response_id", "previous_response_not_found");
    }
    messages = Json::parse(*kept);
  }
  const Json* input = find(asked, "input");
  if (input == nullptr || (!input->is_string() && !input->is_array()) || input->empty() || *input == "") {
    throw bad_request("input is missing or empty, expected text or an array of items", "input");
  }
  if (input->is_string()) {
    messages.push_back({{"role", "user"}, {"content", *input}});
    return messages;
  }
  for (std::size_t i = 0; i < input->size(); ++i)
    add_item((*input)[i], fmt::format("input[{}]", i), messages);
  return messages;
}

// Here the function's fields stand beside its type.
Json read_tools(const Json& tools) {
  if (!tools.is_array()) throw bad_request("tools: expected an array of tools", "tools");
  Json out = Json::array();
  for (std::size_t i = 0; i < tools.size(); ++i) {
    const Json* type = tools[i].is_object() ? find(tools[i], "type") : nullptr;
    if (type == nullptr || *type != "function") {
      throw not_supported(fmt::format("tools[{}].type other than \"function\"", i));
    }
    Json function = tools[i];
    function.erase("type");
    out.push_back({{"type", "function"}, {"function", std::move(function)}});
  }
  return out;
}

Json read_tool_choice(const Json& choice) {
  const Json* name = choice.is_object() ? find(choice, "name") : nullptr;
  if (name == nullptr) return choice;
  return {{"type", "function"}, {"function", {{"name", *name}}}};
}

// text.format to response_format.
void read_text(const Json& text, Json& chat) {
  if (!text.is_object()) throw bad_request("text: expected an object", "text");
  if (const Json* verbosity = find(text, "verbosity"); verbosity != nullptr && *verbosity != "medium") {
    throw not_supported("text.verbosity");
  }
  const Json* format = find(text, "format");
  if (format == nullptr) return;
  const Json* type = format->is_object() ? find(*format, "type") : nullptr;
  if (type == nullptr || !type->is_string()) throw bad_request("text.format.type: expected text", "text");
  if (*type != "json_schema") {
    chat["response_format"] = {{"type", *type}};
    return;
  }
  Json schema = *format;
  schema.erase("type");
  chat["response_format"] = {{"type", "json_schema"}, {"json_schema", std::move(schema)}};
}

void refuse(const Json& asked) {
  for (const char* name : kUnsupported) {
    const auto it = asked.find(name);
    if (it == asked.end() || asks_nothing(*it) || (it->is_number() && *it == 0)) continue;
    throw not_supported(name);
  }
  if (const Json* include = find(asked, "include"); include != nullptr && !include->empty()) {
    // Reasoning is not kept secret here, so there is nothing to encrypt.
    if (*include != Json::array({"reasoning.encrypted_content"})) throw not_supported("include");
  }
  if (const Json* truncation = find(asked, "truncation");
      truncation != nullptr && *truncation != "disabled") {
    throw not_supported("truncation");
  }
}

}  // namespace

ResponsesRequest read_responses_request(std::string_view body, ResponseStore& store) {
  ResponsesRequest out;
  out.asked = parse_ordered(body);
  const Json& asked = out.asked;
  refuse(asked);
  if (const Json* keep = find(asked, "store")) {
    if (!keep->is_boolean()) throw bad_request("store: expected true or false", "store");
    out.store = keep->get<bool>();
  }
  out.messages = read_conversation(asked, store);
  Json messages = out.messages;
  if (const Json* instructions = find(asked, "instructions")) {
    if (!instructions->is_string()) throw bad_request("instructions: expected text", "instructions");
    messages.insert(messages.begin(), Json{{"role", "system"}, {"content", *instructions}});
  }
  // What is not this API's own means the same in a chat, or is refused there.
  for (const auto& [name, value] : asked.items()) {
    if (std::ranges::find(kOwn, name) == std::end(kOwn) && !value.is_null()) out.chat[name] = value;
  }
  for (const char* name : kUnsupported) out.chat.erase(name);
  out.chat["messages"] = std::move(messages);
  if (const Json* tools = find(asked, "tools")) out.chat["tools"] = read_tools(*tools);
  if (const Json* choice = find(asked, "tool_choice")) out.chat["tool_choice"] = read_tool_choice(*choice);
  if (const Json* text = find(asked, "text")) read_text(*text, out.chat);
  if (const Json* most = find(asked, "max_output_tokens")) {
    if (!most->is_number_integer() || *most < 1) {
      throw bad_request("max_output_tokens: expected 1 or more tokens", "max_output_tokens");
    }
    out.chat["max_tokens"] = *most;
  }
  if (const Json* reasoning = find(asked, "reasoning")) {
    const Json* effort = reasoning->is_object() ? find(*reasoning, "effort") : nullptr;
    if (effort != nullptr) out.chat["reasoning_effort"] = *effort;
  }
  return out;
}

}  // namespace flash_mla::server
