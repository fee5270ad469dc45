#pragma once

#include "server/exchange.h"

namespace flash_mla::server {

/// Answers a completion or a chat from the engine, streamed or whole. True if the connection may carry
/// another request. Throws ApiError while nothing has been sent.
awaitable<bool> generate(Exchange& x, bool chat);

}  // namespace flash_mla::server
