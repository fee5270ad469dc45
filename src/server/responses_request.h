#pragma once

#include <string>
#include <string_view>

#include "server/dialect.h"

namespace flash_mla::server {

/// A call of /v1/responses, read.
struct ResponsesRequest {
  Json asked;     ///< the body
  Json chat;      ///< the body of the chat that does it
  Json messages;  ///< the conversation so far, without `instructions`
  bool store = true;
};

/// Throws ApiError for what is wrong, has no translation, or follows a response that is not in `store`.
ResponsesRequest read_responses_request(std::string_view body, ResponseStore& store);

}  // namespace flash_mla::server
