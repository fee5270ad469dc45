#pragma once

#include "server/http_types.h"
#include "server/shared.h"

namespace flash_mla::server {

/// Serves one connection until it ends.
awaitable<void> serve_connection(Shared& shared, beast::tcp_stream stream);

}  // namespace flash_mla::server
