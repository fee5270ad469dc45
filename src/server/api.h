#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/engine.h"

// OpenAI's wire format, apart from HTTP: JSON bodies to engine requests, events to JSON.

namespace flash_mla::server {

using Json = nlohmann::ordered_json;  ///< what is written: fields in the order of OpenAI's documents
/// What clients send: looking up a field of an ordered_json walks over all of them, so that an object with a
/// million fields would take a thread for minutes.
using Body = nlohmann::json;

/// An answer other than success, in OpenAI's error shape.
class ApiError : public std::runtime_error {
 public:
  ApiError(int status, std::string type, const std::string& message, std::string param = {},
           std::string code = {})
      : std::runtime_error(message),
        status_(status),
        type_(std::move(type)),
        param_(std::move(param)),
        code_(std::move(code)) {}
  int status() const { return status_; }
  Json body() const;

 private:
  int status_;
  std::string type_, param_, code_;
};

/// 400, "invalid_request_error".
ApiError bad_request(const std::string& message, std::string param = {});

/// Parses what a client sent. Throws ApiError if it is not a JSON object or nested more than 32 deep: copying
/// a JSON value takes as much stack as it is nested.
Body parse_body(std::string_view text);

struct Call {
  bool chat = false, stream = false, include_usage = false;
  bool logprobs = false;
  int num_choices = 1;            ///< over all prompts
  std::vector<Request> requests;  ///< one per prompt
};

/// Parses the body of /v1/completions or /v1/chat/completions. Throws ApiError.
Call parse_call(std::string_view body, bool chat, const std::string& model_name);

/// Parses the body of /v1/tokenize: its text. Throws ApiError.
std::string parse_tokenize(std::string_view body);

/// Builds the answers of one call from its events.
class Answer {
 public:
  Answer(const Call& call, std::string id, std::string model_name, std::int64_t created,
         const Engine& engine);

  /// A streamed chunk for an event; `index` is the choice over all prompts.
  Json chunk(int index, const GenerationEvent& event);
  /// The last chunk with stream_options.include_usage.
  Json usage_chunk() const;
  /// Collects an event of an answer that is not streamed.
  void collect(int index, const GenerationEvent& event);
  /// Of what has ended so far.
  const Usage& tokens() const { return usage_; }
  /// The collected answer. Throws ApiError if a continuation failed.
  Json complete() const;

 private:
  struct Choice {
    std::string text, finish_reason;
    std::optional<Json> logprobs;  // as OpenAI writes them
    std::int64_t num_characters = 0;
    bool begun = false;
  };

  Json head(const char* object) const;
  void count(const GenerationEvent& event);
  Json logprobs_json(Choice& choice, const GenerationEvent& event) const;
  Json usage() const;

  bool chat_, include_usage_, logprobs_;
  std::string id_, model_name_, error_;
  std::int64_t created_;
  const Engine& engine_;
  std::vector<Choice> choices_;
  std::vector<RequestId> prompts_counted_;
  Usage usage_;
};

}  // namespace flash_mla::server
