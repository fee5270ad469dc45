#include "text/chat_template.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/json.h"
#include "flash_mla/error.h"

namespace flash_mla::text {
namespace {

constexpr std::string_view kUser = "<｜User｜>";
constexpr std::string_view kAssistant = "<｜Assistant｜>";
constexpr std::string_view kEndOfSentence = "<｜end▁of▁sentence｜>";
constexpr std::string_view kThinkEnd = "</think>";

TextPart control(std::string_view text) { return {std::string(text), true}; }
TextPart content(std::string_view text) { return {std::string(text), false}; }

bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

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

/// A token is a string, or an object that describes it. Empty if there is none.
std::string token_of(const JsonObject& config, const char* name) {
  const Json* value = config.find(name);
  if (value != nullptr && value->is_object()) return config.object(name).string("content");
  return config.string_or(name, "");
}

void check_roles(std::span<const ChatMessage> messages) {
  if (messages.empty()) throw InvalidArgument("messages is empty: expected at least one message");
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      throw InvalidArgument(
          fmt::format("messages[{}].role = \"{}\": expected \"system\", \"user\" or \"assistant\"", i, role));
    }
  }
}

}  // namespace

ChatTemplate ChatTemplate::open(const std::filesystem::path& directory) {
  const std::filesystem::path config_path = directory / "tokenizer_config.json";
  const Json json = parse_json(read_file(config_path), config_path.string());
  const JsonObject config(json, config_path.string());
  const std::filesystem::path jinja_path = directory / "chat_template.jinja";
  const bool own_file = std::filesystem::exists(jinja_path);
  const std::string jinja = own_file ? read_file(jinja_path) : template_of(config);
  const std::string origin = own_file ? jinja_path.string() : config.path("chat_template");
  return parse(jinja, token_of(config, "bos_token"), token_of(config, "eos_token"), origin);
}

ChatTemplate ChatTemplate::parse(std::string_view jinja, std::string bos_token, std::string eos_token,
                                 std::string_view origin) {
  ChatTemplate out;
  out.bos_token_ = std::move(bos_token);
  out.eos_token_ = std::move(eos_token);
  // V3.1's template has a switch for thinking; its answers begin otherwise.
  const bool switches_thinking = contains(jinja, "thinking") || contains(jinja, "<｜Assistant｜></think>");
  if (contains(jinja, kUser) && contains(jinja, kAssistant) && !switches_thinking) {
    out.format_ = contains(jinja, kThinkEnd) ? ChatFormat::kR1 : ChatFormat::kV3;
    out.joins_system_ = contains(jinja, "is_first_sp");
    out.begins_with_think_ =
        contains(jinja, "<｜Assistant｜><think>\\n") || contains(jinja, "<｜Assistant｜><think>\n");
    if (contains(jinja, kEndOfSentence)) out.eos_token_ = kEndOfSentence;
    return out;
  }
  if (contains(jinja, "'User: '") && contains(jinja, "'Assistant: '") && contains(jinja, "'Assistant:'")) {
    out.format_ = ChatFormat::kV2;
    return out;
  }
  throw Unsupported(
      fmt::format("{}: the template is \"{}...\": expected one of DeepSeek-V2's, V3's or R1's. Templates in "
                  "general are not run; "
                  "write the prompt out and complete it as text",
                  origin, jinja.substr(0, 60)));
}

std::string ChatTemplate::apply(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  std::string out;
  for (const TextPart& part : parts(messages, add_generation_prompt)) out += part.text;
  return out;
}

std::vector<TextPart> ChatTemplate::parts(std::span<const ChatMessage> messages,
                                          bool add_generation_prompt) const {
  check_roles(messages);
  return format_ == ChatFormat::kV2 ? parts_v2(messages, add_generation_prompt)
                                    : parts_v3(messages, add_generation_prompt);
}

std::vector<TextPart> ChatTemplate::parts_v2(std::span<const ChatMessage> messages,
                                             bool add_generation_prompt) const {
  std::vector<TextPart> out = {control(bos_token_)};
  for (const ChatMessage& m : messages) {
    if (m.role == "user") {
      out.insert(out.end(), {control("User: "), content(m.content), control("\n\n")});
    } else if (m.role == "assistant") {
      out.insert(out.end(), {control("Assistant: "), content(m.content), control(eos_token_)});
    } else {
      out.insert(out.end(), {content(m.content), control("\n\n")});
    }
  }
  if (add_generation_prompt) out.push_back(control("Assistant:"));
  return out;
}

std::vector<TextPart> ChatTemplate::parts_v3(std::span<const ChatMessage> messages,
                                             bool add_generation_prompt) const {
  // Wherever system messages stand, they come first.
  std::string system;
  bool first_system = true;
  for (const ChatMessage& m : messages) {
    if (m.role != "system") continue;
    system = joins_system_ && !first_system ? system + "\n\n" + m.content : m.content;
    first_system = false;
  }
  std::vector<TextPart> out = {control(bos_token_), content(system)};
  for (const ChatMessage& m : messages) {
    if (m.role == "user") {
      out.insert(out.end(), {control(kUser), content(m.content)});
    } else if (m.role == "assistant") {
      std::string_view answer = m.content;
      if (const std::size_t end = answer.rfind(kThinkEnd); format_ == ChatFormat::kR1 && end != answer.npos) {
        answer = answer.substr(end + kThinkEnd.size());
      }
      out.insert(out.end(), {control(kAssistant), content(answer), control(eos_token_)});
    }
  }
  if (add_generation_prompt) {
    out.push_back(control(kAssistant));
    if (begins_with_think_) out.push_back(control("<think>\n"));
  }
  return out;
}

}  // namespace flash_mla::text
