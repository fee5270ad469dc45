#pragma once

#include <optional>

#include "server/exchange.h"

namespace flash_mla::server {

/// Throws ApiError (403) for a request that names another host than this server, or that a browser sends from
/// another site's page which may not (ServerOptions::allowed_hosts, cors_origins).
void check_site(const Exchange& x);

/// The answer to a browser that asks before it lets a page send its request (CORS); empty for all other
/// requests, and where no page may.
std::optional<HttpResponse> preflight(const Exchange& x);

/// Lets the browser show an answer to its page, if the page may read it.
void add_cors_fields(const Exchange& x, http::fields& head);

}  // namespace flash_mla::server
