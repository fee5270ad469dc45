#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/engine.h"
#include "server/api_error.h"
#include "server/chat_fields.h"
#include "server/chat_output.h"

// OpenAI's wire format of what is asked for: JSON bodies to engine requests.

namespace flash_mla::server {

struct Call {
  bool chat = false, stream = false, include_usage = false;
  bool logprobs = false;
  bool prompt_logprobs = false;  ///< in a field of their own
  bool echo = false;             ///< the prompt comes back in front of each text
  /// A grammar has to be made for it, which takes up to a second.
  bool needs_grammar() const { return !format_field.empty() || tools.wants_grammar(); }
  std::string format_field;         ///< what says that the text must be of a format; empty: nothing
  int n = 1;                        ///< choices of each prompt in the answer
  int num_continuations = 1;        ///< of each prompt: n, or best_of, of which the n best are answered
  int num_choices = 1;              ///< continuations over all prompts
  std::vector<Request> requests;    ///< one per prompt
  std::vector<std::string> echoed;  ///< with echo: texts of the prompts; empty where token ids were given
  ToolUse tools;
  std::optional<bool> thinking;    ///< the model's reasoning, on or off; see prepare_chat
  std::string thinking_field;      ///< which says so
  bool separate_reasoning = true;  ///< false leaves it where the model wrote it
  bool include_reasoning = true;   ///< false leaves it out of the answer
  ChatOutputOptions output;        ///< see prepare_chat
  /// Fields of the body that no API defines: they have no effect. At most kMaxUnknownFields of them.
  std::vector<std::string> unknown_fields;
};

/// Parses the body of /v1/completions or /v1/chat/completions. Throws ApiError.
/// `model_names`: what the one model may be called. `defaults`: the temperature and its like where the body says
/// nothing of them.
Call parse_call(std::string_view body, bool chat, const std::vector<std::string>& model_names,
                const SamplingParams& defaults = {});

struct TokenizeCall {
  std::string prompt;
  bool add_special_tokens = true;
};

/// Parses the body of /v1/tokenize. Throws ApiError.
TokenizeCall parse_tokenize(std::string_view body);

struct DetokenizeCall {
  std::vector<std::int32_t> tokens;
  bool skip_special_tokens = false;
};

/// Parses the body of /v1/detokenize. Throws ApiError, also for what is no token of the vocabulary.
DetokenizeCall parse_detokenize(std::string_view body, std::int32_t vocab_size);

}  // namespace flash_mla::server
