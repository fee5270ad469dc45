#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace flash_mla::model {

struct ChatMessage {
  std::string role;  ///< "system", "user" or "assistant"
  std::string content;
};

/// The formats that DeepSeek's checkpoints were trained with. The published files state them as Jinja
/// templates; here they are code, chosen by what the template contains.
enum class ChatFormat {
  kV2,  ///< "User: ...\n\nAssistant: ..." (V2, V2-Lite, V2.5's predecessors)
  kV3,  ///< "<｜User｜>...<｜Assistant｜>..." (V2.5, V3)
  kR1,  ///< as kV3, and an earlier answer's reasoning up to "</think>" is left out (R1, V3-0324's sibling)
};

/// Turns a conversation into the text of a prompt. The text has the begin-of-sentence token in front and
/// other special tokens within: encode it with add_special_tokens = false, allow_special = true. Text of a
/// message that spells special tokens is taken as such, as with the published templates; see escape_special.
class ChatTemplate {
 public:
  /// Reads DIR/chat_template.jinja, or "chat_template" in DIR/tokenizer_config.json. Throws InvalidArgument
  /// if there is none, Unsupported if it is not one of DeepSeek's.
  static ChatTemplate open(const std::filesystem::path& directory);
  /// From the text of the Jinja template and of the tokens it refers to. `origin` names it in errors.
  static ChatTemplate parse(std::string_view jinja, std::string bos_token, std::string eos_token,
                            std::string_view origin);

  ChatFormat format() const { return format_; }

  /// The prompt. `add_generation_prompt` ends it with what begins an answer. Throws InvalidArgument for an
  /// unknown role or, where the format has no place for it, a message out of order.
  std::string apply(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;

 private:
  ChatTemplate(ChatFormat format, std::string bos_token, std::string eos_token);

  ChatFormat format_;
  std::string bos_token_;
  std::string eos_token_;
  /// R1's newer templates begin an answer with "<think>\n".
  bool generation_prompt_thinks_ = false;
};

}  // namespace flash_mla::model
