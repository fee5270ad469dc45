#include "text/chat_template.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/json.h"
#include "flash_mla/error.h"
#include "text/jinja/json_text.h"
#include "text/utf8.h"

namespace flash_mla::text {
namespace {

using jinja::MarkedText;
using jinja::Value;

/// A format without a template, and how it was recognised.
struct BuiltIn {
  DeepSeekFormat format;
  std::string because;
};

std::optional<BuiltIn> built_in_format(const std::filesystem::path& directory) {
  const std::filesystem::path config_path = directory / "config.json";
  if (std::filesystem::exists(config_path)) {
    const Json config = parse_json(read_file(config_path), config_path.string());
    const std::string type = JsonObject(config, config_path.string()).string_or("model_type", "");
    const std::string because = fmt::format("{}: model_type = \"{}\"", config_path.string(), type);
    if (type == "deepseek_v32") return BuiltIn{DeepSeekFormat::kV32, because};
    if (type == "deepseek_v4") return BuiltIn{DeepSeekFormat::kV4, because};
  }
  const std::filesystem::path tokens_path = directory / "tokenizer.json";
  if (!std::filesystem::exists(tokens_path)) return std::nullopt;
  const Json tokenizer = parse_json(read_file(tokens_path), tokens_path.string());
  const auto has_token = [&](std::string_view content) {
    const Json* added = JsonObject(tokenizer, tokens_path.string()).find("added_tokens");
    return added != nullptr && std::ranges::any_of(*added, [&](const Json& token) {
             return token.is_object() && token.contains("content") && token["content"] == content;
           });
  };
  constexpr std::string_view kOfBoth = "｜DSML｜", kOfV4 = "<｜latest_reminder｜>";
  if (!has_token(kOfBoth)) return std::nullopt;
  const bool v4 = has_token(kOfV4);
  return BuiltIn{v4 ? DeepSeekFormat::kV4 : DeepSeekFormat::kV32,
                 fmt::format("{}: the added token \"{}\"", tokens_path.string(), v4 ? kOfV4 : kOfBoth)};
}

/// "chat_template": a string, or a list of named ones of which "default" counts.
std::string template_of(const JsonObject& config) {
  const Json* value = config.find("chat_template");
  if (value == nullptr) config.fail("chat_template", "a chat template; is this a base model?");
  if (value->is_array()) {
    for (const Json& named : *value) {
      const JsonObject entry(named, config.origin(), "chat_template.");
      if (entry.string("name") == "default") return entry.string("template");
    }
    config.fail("chat_template", "one named \"default\"");
  }
  return config.string("chat_template");
}

/// A token is a string, or an object that describes it; nothing if there is none.
std::optional<std::string> token_of(const JsonObject& config, const char* name) {
  const Json* value = config.find(name);
  if (value == nullptr) return std::nullopt;
  return value->is_object() ? config.object(name).string("content") : config.string(name);
}

void check_roles(std::span<const ChatMessage> messages) {
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      throw InvalidArgument(
          fmt::format("messages[{}].role = \"{}\": expected \"system\", \"user\" or \"assistant\"", i, role));
    }
  }
}

[[noreturn]] void fail_empty() { throw InvalidArgument("messages is empty: expected at least one message"); }

Value client_text(std::string_view text) {
  std::string storage;
  return MarkedText(replace_invalid_utf8(text, storage), /*control=*/false);
}

ChatInput as_input(std::span<const ChatMessage> messages, bool add_generation_prompt,
                   const nlohmann::ordered_json& variables) {
  ChatInput out{nlohmann::ordered_json::array(), variables, add_generation_prompt};
  for (const ChatMessage& message : messages) {
    out.messages.push_back({{"role", message.role}, {"content", message.content}});
  }
  return out;
}

Value own_text(std::string_view text) { return MarkedText::constant(text, /*control=*/true); }

}  // namespace

ChatTemplate ChatTemplate::open(const std::filesystem::path& directory,
                                const std::optional<std::filesystem::path>& file) {
  const std::filesystem::path config_path = directory / "tokenizer_config.json";
  const Json json = parse_json(read_file(config_path), config_path.string());
  const JsonObject config(json, config_path.string());
  const std::filesystem::path jinja_path = file.value_or(directory / "chat_template.jinja");
  const bool own_file = file || std::filesystem::exists(jinja_path);
  ChatTemplate out;
  if (!own_file && !config.has("chat_template")) {
    if (std::optional<BuiltIn> built_in = built_in_format(directory)) {
      out.format_ = built_in->format;
      out.origin_ =
          fmt::format("{}, built in ({})", deepseek_format_name(built_in->format), built_in->because);
      return out;
    }
  }
  out.origin_ = own_file ? jinja_path.string() : config.path("chat_template");
  out.template_ = jinja::Template::parse(own_file ? read_file(jinja_path) : template_of(config), out.origin_);
  for (const char* name :
       {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
    if (std::optional<std::string> token = token_of(config, name))
      out.tokens_.emplace_back(name, std::move(*token));
  }
  return out;
}

ChatTemplate ChatTemplate::parse(std::string_view jinja, std::string bos_token, std::string eos_token,
                                 std::string_view origin) {
  ChatTemplate out;
  out.origin_ = origin;
  out.template_ = jinja::Template::parse(jinja, origin);
  out.tokens_ = {{"bos_token", std::move(bos_token)}, {"eos_token", std::move(eos_token)}};
  return out;
}

std::string ChatTemplate::apply(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  std::string out;
  for (const TextPart& part : parts(messages, add_generation_prompt)) out += part.text;
  return out;
}

/// With what transformers gives a template: the messages, the special tokens, and the client's variables, which
/// may not stand for a special token.
std::vector<TextPart> ChatTemplate::render(Value messages, bool add_generation_prompt,
                                           const nlohmann::ordered_json& variables) const {
  std::vector<std::pair<std::string, Value>> all = {{"messages", std::move(messages)},
                                                    {"add_generation_prompt", add_generation_prompt}};
  for (const auto& [name, text] : tokens_) all.emplace_back(name, own_text(text));
  for (const char* name : {"tools", "documents"}) {
    if (!variables.contains(name)) all.emplace_back(name, jinja::None());
  }
  for (const auto& [name, value] : variables.items()) {
    if (std::ranges::find(all, name, &std::pair<std::string, Value>::first) == all.end()) {
      all.emplace_back(name, jinja::from_json(value));
    }
  }
  return template_.render(all);
}

std::vector<TextPart> ChatTemplate::parts(std::span<const ChatMessage> messages, bool add_generation_prompt,
                                          const nlohmann::ordered_json& variables) const {
  if (messages.empty()) fail_empty();
  check_roles(messages);
  if (format_) return parts(as_input(messages, add_generation_prompt, variables));
  const Value role = own_text("role"), content = own_text("content");
  jinja::List list;
  list.items.reserve(messages.size());
  for (const ChatMessage& message : messages) {
    jinja::Dict dict;
    dict.set(role, client_text(message.role));
    dict.set(content, client_text(message.content));
    list.items.push_back(std::move(dict));
  }
  try {
    return render(std::move(list), add_generation_prompt, variables);
  } catch (const jinja::Problem& problem) {
    throw InvalidArgument(fmt::format("chat_template_kwargs: {}", problem.what));
  }
}

std::vector<TextPart> ChatTemplate::parts(const ChatInput& input) const {
  if (!input.messages.is_array() || input.messages.empty()) fail_empty();
  try {
    if (format_) return render_deepseek(*format_, input);
    return render(jinja::from_json(input.messages), input.add_generation_prompt, input.variables);
  } catch (const jinja::Problem& problem) {
    throw InvalidArgument(fmt::format("messages: {}", problem.what));
  }
}

nlohmann::ordered_json parse_chat_variables(std::string_view text) {
  if (text.empty()) return nlohmann::ordered_json::object();
  if (text.size() > kMaxChatVariableBytes) {
    throw InvalidArgument(fmt::format("chat_template_kwargs has {} bytes, expected at most {}", text.size(),
                                      kMaxChatVariableBytes));
  }
  try {
    if (jinja::parse_json(text).dict() == nullptr) throw jinja::Problem{"no object"};  // bounds the nesting
  } catch (const jinja::Problem& problem) {
    throw InvalidArgument(fmt::format("chat_template_kwargs: {}; expected a JSON object", problem.what));
  }
  nlohmann::ordered_json out = nlohmann::ordered_json::parse(text);
  for (const char* name : {"messages", "add_generation_prompt"}) {
    if (out.contains(name)) {
      throw InvalidArgument(fmt::format("chat_template_kwargs.{}: expected other names than this", name));
    }
  }
  return out;
}

}  // namespace flash_mla::text
