#include "text/deepseek/renderer.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"
#include "text/jinja/json_text.h"
#include "text/utf8.h"

namespace flash_mla::text::deepseek {
namespace {

constexpr std::string_view kResponseFormat =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

bool flag(const OrderedJson& variables, const char* name, bool otherwise) {
  const OrderedJson* value = find(variables, name);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) {
    throw InvalidArgument(fmt::format("chat_template_kwargs.{}: expected true or false", name));
  }
  return value->get<bool>();
}

std::string json_text(const OrderedJson& value) {
  return std::string(jinja::to_json(jinja::from_json(value), {}).view());
}

jinja::Value parsed_arguments(const std::string& text, bool loose) {
  try {
    return jinja::parse_json(text);
  } catch (const jinja::Problem&) {
    if (!loose) throw;
    return jinja::from_json({{"arguments", text}});
  }
}

}  // namespace

const OrderedJson* find(const OrderedJson& object, const char* name) {
  const auto it = object.find(name);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

const OrderedJson* find_some(const OrderedJson& object, const char* name) {
  const OrderedJson* value = find(object, name);
  if (value == nullptr || (value->is_structured() && value->empty())) return nullptr;
  return value->is_string() && value->get_ref<const std::string&>().empty() ? nullptr : value;
}

void fail(const Turn& turn, std::string_view what) {
  throw InvalidArgument(fmt::format("messages[{}]{}", turn.index, what));
}

std::string string_of(const OrderedJson& object, const char* name) {
  const OrderedJson* value = find(object, name);
  return value != nullptr && value->is_string() ? value->get<std::string>() : "";
}

std::string text_of(const Turn& turn, const char* name) {
  const OrderedJson* value = find(*turn.message, name);
  if (value == nullptr) return "";
  if (value->is_string()) return value->get<std::string>();
  const std::string expected = fmt::format(".{}: expected a string or parts that are text", name);
  if (!value->is_array()) fail(turn, expected);
  std::string out;
  for (const OrderedJson& part : *value) {
    const OrderedJson* text =
        part.is_object() && string_of(part, "type") == "text" ? find(part, "text") : nullptr;
    if (text == nullptr || !text->is_string()) fail(turn, expected);
    out += text->get_ref<const std::string&>();
  }
  return out;
}

void Prompt::client(std::string_view text) {
  std::string storage;
  add(replace_invalid_utf8(text, storage), /*control=*/false);
}

void Prompt::add(std::string_view text, bool control) {
  if (text.empty()) return;
  if (parts_.empty() || parts_.back().control != control) parts_.push_back({"", control});
  parts_.back().text += text;
}

Renderer::Renderer(const ChatInput& input, std::string_view tools, std::string_view end_of_tools,
                   std::string_view calls)
    : thinking_(flag(input.variables, "thinking", false) || flag(input.variables, "enable_thinking", false)),
      drop_thinking_(flag(input.variables, "drop_thinking", true)),
      generate_(input.add_generation_prompt),
      tools_(tools),
      end_of_tools_(end_of_tools),
      calls_(calls) {
  turns_.reserve(input.messages.size() + 1);
  for (std::size_t i = 0; i < input.messages.size(); ++i) {
    const OrderedJson& message = input.messages[i];
    turns_.push_back({message.is_object() ? &message : nullptr, i, "", "", {}});
    if (!message.is_object()) fail(turns_.back(), ": expected an object with role and content");
    turns_.back().role = string_of(message, "role");
  }
  given_tools_ = find_some(input.variables, "tools");
  static const OrderedJson kNoSystem = {{"role", "system"}};
  if (given_tools_ != nullptr && turns_.front().role != "system") {
    turns_.insert(turns_.begin(), {&kNoSystem, 0, "system", "", {}});
  }
  prompt_.own(kBegin);
}

const OrderedJson* Renderer::tools_of(std::size_t i) const {
  const OrderedJson* own = find_some(*turns_[i].message, "tools");
  return own == nullptr && i == 0 ? given_tools_ : own;
}

void Renderer::find_last_user() {
  last_user_ = -1;
  for (std::size_t i = 0; i < turns_.size(); ++i) {
    if (turns_[i].role == "user" || turns_[i].role == "developer") last_user_ = static_cast<long>(i);
  }
}

void Renderer::drop_old(std::span<const std::string_view> kept_roles) {
  find_last_user();
  std::size_t i = 0;
  std::erase_if(turns_, [&](const Turn& turn) {
    return static_cast<long>(i++) < last_user_ &&
           std::ranges::find(kept_roles, turn.role) == kept_roles.end();
  });
  find_last_user();
}

void Renderer::put_tools(std::size_t i) {
  const OrderedJson* tools = tools_of(i);
  if (tools == nullptr) return;
  if (!tools->is_array()) throw InvalidArgument("tools: expected an array");
  prompt_.own("\n\n");
  prompt_.own(tools_);
  for (std::size_t k = 0; k < tools->size(); ++k) {
    const OrderedJson& tool = (*tools)[k];
    const OrderedJson* function = tool.is_object() ? find(tool, "function") : nullptr;
    if (function == nullptr) throw InvalidArgument(fmt::format("tools[{}].function is missing", k));
    if (k > 0) prompt_.own("\n");
    prompt_.client(json_text(*function));
  }
  prompt_.own(end_of_tools_);
}

void Renderer::put_response_format(std::size_t i) {
  const OrderedJson* format = find_some(*turns_[i].message, "response_format");
  if (format == nullptr) return;
  prompt_.own("\n\n");
  prompt_.own(kResponseFormat);
  prompt_.client(json_text(*format));
}

void Renderer::put_arguments(const Turn& turn, const OrderedJson& function, bool loose) {
  const OrderedJson* given = find(function, "arguments");
  jinja::Value arguments;
  if (given != nullptr && given->is_string()) {
    arguments = parsed_arguments(given->get_ref<const std::string&>(), loose);
  } else if (given != nullptr) {
    arguments = jinja::from_json(*given);
  }
  if (arguments.dict() == nullptr) {
    fail(turn, ".tool_calls: a function's arguments are no object in JSON, expected one");
  }
  bool first = true;
  for (const auto& [name, value] : arguments.dict()->items()) {
    prompt_.own(first ? "<｜DSML｜parameter name=\"" : "\n<｜DSML｜parameter name=\"");
    first = false;
    prompt_.client(name.text()->view());
    const bool text = value.text() != nullptr;
    prompt_.own(text ? "\" string=\"true\">" : "\" string=\"false\">");
    prompt_.client(text ? value.text()->view() : jinja::to_json(value, {}).view());
    prompt_.own("</｜DSML｜parameter>");
  }
}

void Renderer::put_calls(const Turn& turn, bool loose) {
  const OrderedJson* calls = find_some(*turn.message, "tool_calls");
  if (calls == nullptr) return;
  if (!calls->is_array()) fail(turn, ".tool_calls: expected an array");
  prompt_.own(fmt::format("\n\n<｜DSML｜{}>\n", calls_));
  for (const OrderedJson& call : *calls) {
    const OrderedJson* function = call.is_object() ? find(call, "function") : nullptr;
    const OrderedJson* name =
        function != nullptr && function->is_object() ? find(*function, "name") : nullptr;
    if (name == nullptr || !name->is_string()) {
      fail(turn, ".tool_calls: expected objects with function.name and function.arguments");
    }
    prompt_.own("<｜DSML｜invoke name=\"");
    prompt_.client(name->get_ref<const std::string&>());
    prompt_.own("\">\n");
    put_arguments(turn, *function, loose);
    prompt_.own("\n</｜DSML｜invoke>\n");
  }
  prompt_.own(fmt::format("</｜DSML｜{}>", calls_));
}

std::string Renderer::reasoning_of(const Turn& turn) {
  return find_some(*turn.message, "reasoning_content") != nullptr ? text_of(turn, "reasoning_content")
                                                                  : text_of(turn, "reasoning");
}

void Renderer::fail_role(const Turn& turn, std::string_view expected) {
  fail(turn, fmt::format(".role = \"{}\": expected {}", turn.role, expected));
}

}  // namespace flash_mla::text::deepseek
