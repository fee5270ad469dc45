#pragma once

#include "server/exchange.h"
#include "server/routes.h"

namespace flash_mla::server {

/// Answers a completion, a chat or what is translated into one from the engine, streamed or whole. True if the connection may carry
/// another request. Throws ApiError while nothing has been sent.
awaitable<bool> generate(Exchange& x, Route::Generates api);

}  // namespace flash_mla::server
