#pragma once

#include <string>
#include <string_view>

#include "server/exchange.h"

namespace flash_mla::server {

/// A path that this server answers.
struct Route {
  http::verb method;
  bool open;              ///< needs no API key
  std::string_view path;  ///< ends with '/': the model's name follows
  /// Makes the answer; null where `generates` says that it comes from the engine. Throws ApiError.
  HttpResponse (*respond)(const Exchange& x);
  enum class Generates {
    kNothing,
    kCompletion,
    kChat,
    kResponses,
    kMessages
  } generates = Generates::kNothing;
};

/// The route of a request; HEAD goes where GET goes. Throws ApiError (401, 404, 405).
const Route& find_route(const Exchange& x);

/// Whether a path belongs to Anthropic's API, which has errors of its own shape.
bool is_messages_path(const Exchange& x);

/// The methods of a path, as an Allow header names them; empty for an unknown path.
std::string allowed_methods(const Exchange& x);

}  // namespace flash_mla::server
