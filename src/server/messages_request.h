#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/dialect.h"

namespace flash_mla::server {

/// A call of /v1/messages, read.
struct MessagesRequest {
  Json chat;                       ///< the body of the chat that does it
  std::vector<std::string> stops;  ///< stop_sequences
};

/// `counts`: for count_tokens, where max_tokens need not be. Throws ApiError for what is wrong or has no
/// translation.
MessagesRequest read_messages_request(std::string_view body, bool counts);

}  // namespace flash_mla::server
