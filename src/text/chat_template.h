#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/chat.h"
#include "text/tokenizer.h"

namespace flash_mla::text {

/// The formats that DeepSeek's checkpoints were trained with. The published files state them as Jinja
/// templates; here they are code, chosen by what the template contains.
enum class ChatFormat {
  kV2,  ///< "User: ...\n\nAssistant: ..." (V2, V2-Lite)
  kV3,  ///< "<｜User｜>...<｜Assistant｜>..." (V2.5, V3)
  kR1,  ///< as kV3, and of earlier answers only what follows the last "</think>" (R1, V3-0324)
};

/// Turns a conversation into the text of a prompt. The text has the begin-of-sentence token in front and
/// other special tokens within. Encode `parts`: what a message's content spells out is then ordinary text.
/// The text of `apply`, encoded with add_special_tokens = false and allow_special = true, gives what the
/// published templates give: special tokens in a content are such tokens too.
class ChatTemplate {
 public:
  /// Reads DIR/chat_template.jinja, or else "chat_template" of DIR/tokenizer_config.json, and the tokens of
  /// the latter. Throws InvalidArgument if there is none, Unsupported if it is not one of DeepSeek's.
  static ChatTemplate open(const std::filesystem::path& directory);
  /// From the text of the Jinja template and of the tokens it refers to. `origin` names it in errors.
  static ChatTemplate parse(std::string_view jinja, std::string bos_token, std::string eos_token,
                            std::string_view origin);

  ChatFormat format() const { return format_; }

  /// The prompt. `add_generation_prompt` ends it with what begins an answer. Throws InvalidArgument for no
  /// messages and for an unknown role.
  std::string apply(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;
  /// The same prompt in parts: the template's own text is control, contents are not.
  std::vector<TextPart> parts(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;

 private:
  ChatTemplate() = default;
  std::vector<TextPart> parts_v2(std::span<const ChatMessage> messages, bool add_generation_prompt) const;
  std::vector<TextPart> parts_v3(std::span<const ChatMessage> messages, bool add_generation_prompt) const;

  ChatFormat format_ = ChatFormat::kV2;
  std::string bos_token_;
  std::string eos_token_;
  // V3 and R1: several system messages are joined by an empty line (else the last one counts), and an answer
  // begins with "<think>\n".
  bool joins_system_ = false;
  bool begins_with_think_ = false;
};

}  // namespace flash_mla::text
