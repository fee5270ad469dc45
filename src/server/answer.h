#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "flash_mla/engine.h"
#include "server/call.h"

namespace flash_mla::server {

/// What ended a text besides max_tokens, which the client knows of: "model", "cache" or "".
std::string limited_by(const GenerationEvent& event);

/// Builds the answers of one call from its events.
class Answer {
 public:
  Answer(const Call& call, std::string id, std::string model_name, std::int64_t created,
         const Engine& engine);

  /// A streamed chunk for an event; `index` is the choice over all prompts. Nothing where the event has no
  /// news for the client (yet).
  std::optional<Json> chunk(int index, GenerationEvent event);
  /// The last chunk with stream_options.include_usage.
  Json usage_chunk() const;
  /// Collects an event of an answer that is not streamed.
  void collect(int index, GenerationEvent event);
  /// Whether a choice has ended: with its continuation, or before that, when nothing more can come of it.
  bool over(int index) const { return choices_[static_cast<std::size_t>(index)].over; }
  /// Of what has ended so far.
  const Usage& tokens() const { return usage_; }
  /// The collected answer. Throws ApiError if a continuation failed.
  Json complete() const;

 private:
  struct Choice {
    std::string text, finish_reason;  // a chat's text: what is neither reasoning nor a call
    std::optional<ChatOutput> output;
    std::optional<ReasoningCounter> reasoning_tokens;
    std::string reasoning;
    Json tool_calls = Json::array();
    std::string limited_by;        // beyond OpenAI: what ended the text besides max_tokens
    std::optional<Json> logprobs;  // as OpenAI writes them
    Json prompt_logprobs;          // null: none were asked for
    std::int64_t num_characters = 0;
    double sum_logprobs = 0;  // of its tokens, if they have them
    std::int64_t num_tokens = 0;
    bool begun = false, over = false;
  };

  Json head(const char* object) const;
  void count(const GenerationEvent& event);
  void begin(int index, GenerationEvent& event);
  Json chat_logprobs(std::span<const TokenLogprobs> logprobs) const;
  ChatPiece take(Choice& choice, GenerationEvent& event);
  static std::string finish_reason(const Choice& choice, const GenerationEvent& event);
  static Json message(const Choice& choice);
  Json logprobs_json(Choice& choice, const GenerationEvent& event) const;
  Json prompt_logprobs_json(const GenerationEvent& event) const;
  std::vector<std::size_t> best() const;
  Json usage() const;

  bool chat_, include_usage_, logprobs_, prompt_logprobs_, echo_, include_reasoning_;
  int n_, num_continuations_;
  std::vector<std::string> echoed_;
  std::string id_, model_name_, error_;
  std::int64_t created_;
  const Engine& engine_;
  std::vector<Choice> choices_;
  std::vector<RequestId> prompts_counted_;
  Usage usage_;
  std::int64_t reasoning_tokens_ = 0;
};

}  // namespace flash_mla::server
