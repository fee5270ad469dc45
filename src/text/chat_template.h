#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flash_mla/chat.h"
#include "text/deepseek_format.h"
#include "text/jinja/template.h"
#include "text/text_part.h"

namespace flash_mla::text {

/// A conversation as a client sends it. `messages` is an array of objects, whatever fields they have;
/// `variables` an object of what else the template is to see ("tools", "thinking"), none of them called
/// "messages" or "add_generation_prompt".
struct ChatInput {
  nlohmann::ordered_json messages;
  nlohmann::ordered_json variables = nlohmann::ordered_json::object();
  bool add_generation_prompt = true;
};

/// Most bytes that parse_chat_variables takes: nlohmann::ordered_json searches an object's keys one by one.
inline constexpr std::size_t kMaxChatVariableBytes = std::size_t{64} * 1024;
/// `text` as ChatInput::variables; empty: none. Throws InvalidArgument if it is no JSON object, has one of the
/// two names, or is longer than kMaxChatVariableBytes.
nlohmann::ordered_json parse_chat_variables(std::string_view text);

/// Turns a conversation into the text of a prompt, by the Jinja template that a checkpoint comes with, or in one
/// of the formats that DeepSeek publishes as code. Encode
/// `parts`: what comes of a client's values is then ordinary text, while the template's own text may spell
/// special tokens. The text of `apply`, encoded with add_special_tokens = false and allow_special = true,
/// gives what transformers gives: special tokens in a content are such tokens too.
class ChatTemplate {
 public:
  /// `file` if it is given; else DIR/chat_template.jinja, or else "chat_template" of
  /// DIR/tokenizer_config.json. The latter's tokens (bos_token and its like) are the template's. Without any, the
  /// format of DeepSeek V3.2 or V4 if "model_type" of DIR/config.json names one of them, or if the tokens added
  /// in DIR/tokenizer.json are theirs. Throws InvalidArgument if there is none of all that, Unsupported, with
  /// file and line, for a template that is not understood in full.
  static ChatTemplate open(const std::filesystem::path& directory,
                           const std::optional<std::filesystem::path>& file = std::nullopt);
  /// From the text of the Jinja template and of the tokens it refers to. `origin` names it in errors.
  static ChatTemplate parse(std::string_view jinja, std::string bos_token, std::string eos_token,
                            std::string_view origin);

  /// The prompt. `add_generation_prompt` ends it with what begins an answer. Throws InvalidArgument for no
  /// messages, for an unknown role, and for messages that the template refuses.
  std::string apply(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;
  /// The same prompt in parts: the template's own text is control, contents are not.
  std::vector<TextPart> parts(
      std::span<const ChatMessage> messages, bool add_generation_prompt = true,
      const nlohmann::ordered_json& variables = nlohmann::ordered_json::object()) const;
  /// For conversations with more than roles and contents. Throws InvalidArgument as above; which roles there
  /// are is for the template to say.
  std::vector<TextPart> parts(const ChatInput& input) const;

  /// Where it came from: a file, or a file and its field; of a format that is built in, its name and how it was
  /// recognised.
  const std::string& origin() const { return origin_; }
  /// Whether the template looks at a variable of this name ("tools", "thinking").
  bool reads(std::string_view variable) const {
    return format_ ? deepseek_format_reads(*format_, variable) : template_.reads(variable);
  }

 private:
  ChatTemplate() = default;
  std::vector<TextPart> render(jinja::Value messages, bool add_generation_prompt,
                               const nlohmann::ordered_json& variables) const;

  std::optional<DeepSeekFormat> format_;
  jinja::Template template_;  // without a format_
  std::string origin_;
  std::vector<std::pair<std::string, std::string>> tokens_;  // by their names: bos_token, ...
};

}  // namespace flash_mla::text
