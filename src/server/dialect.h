#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "flash_mla/engine.h"
#include "server/api_error.h"

// Other APIs in front of chat completions: what is asked is translated into the body of a chat, and a chat's
// answer into what the API's clients read. So whatever a chat can do, they can.

namespace flash_mla::server {

/// One call of another API, and its answer.
class Dialect {
 public:
  virtual ~Dialect() = default;

  /// The body of the chat completion that does what was asked. Once: a stream may wait for long, with a long
  /// conversation.
  virtual std::string take_chat_body() = 0;

  /// The answer, from a chat completion.
  virtual Json whole(const Json& completion) = 0;

  /// Server-sent events, as text, at the beginning of a stream.
  virtual std::string begin() { return {}; }
  /// For a chunk of a streamed chat; `usage` is what its continuation has used so far.
  virtual std::string chunk(const Json& chunk, const Usage& usage) = 0;
  /// At the end; `last` has a chat's usage.
  virtual std::string end(const Json& last) = 0;
  /// For a stream that failed; nothing follows.
  virtual std::string failed(const ApiError& error) = 0;
};

class ResponseStore;

/// OpenAI's /v1/responses. Throws ApiError for what is wrong or cannot be translated. `store` outlives it.
std::unique_ptr<Dialect> responses_dialect(std::string_view body, ResponseStore& store);
/// Anthropic's /v1/messages. Throws ApiError.
std::unique_ptr<Dialect> messages_dialect(std::string_view body);

/// The chat whose prompt /v1/messages/count_tokens counts. Throws ApiError.
std::string messages_to_count(std::string_view body);

/// An error as Anthropic's clients read it.
Json messages_error(const ApiError& error, const std::string& request_id);

/// A server-sent event of that name.
std::string sent_event(std::string_view name, const Json& data);

/// A new id that nobody can guess: `prefix` and 32 letters.
std::string new_id(std::string_view prefix);

/// What a client sent, its fields in its order. Throws ApiError as parse_body, and for objects with more than
/// kMaxOrderedFields fields.
Json parse_ordered(std::string_view text);

/// A field's value if it is there and not null.
const Json* find(const Json& json, const char* key);

/// The text of a string, or of an array of parts of which each has one of `types`. Throws ApiError that names
/// `where`.
std::string text_of_parts(const Json& content, const std::string& where,
                          std::initializer_list<std::string_view> types);

}  // namespace flash_mla::server
