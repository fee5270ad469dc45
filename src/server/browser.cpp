#include "server/browser.h"

#include <fmt/format.h>

#include "server/origin.h"
#include "server/routes.h"

namespace flash_mla::server {
namespace {

bool may_read(const Exchange& x) {
  const std::string_view origin = view(x.request[http::field::origin]);
  return !origin.empty() && is_allowed_origin(origin, x.shared.options.cors_origins);
}

}  // namespace

void check_site(const Exchange& x) {
  const std::string_view host = view(x.request[http::field::host]);
  if (!is_allowed_host(host, x.shared.options.allowed_hosts, x.shared.loopback)) {
    throw ApiError(403, "invalid_request_error",
                   fmt::format("Host is \"{}\", a name that this server does not answer to (--allowed-host)",
                               host.substr(0, kMaxLoggedBytes)),
                   "", "host_not_allowed");
  }
  // A page may send what needs no preflight, and have this machine work for it, though it cannot read the
  // answer. Browsers, and nobody else, say so.
  if (x.request.method() == http::verb::post && view(x.request["sec-fetch-site"]) == "cross-site" &&
      !may_read(x)) {
    throw ApiError(403, "invalid_request_error",
                   fmt::format("pages of origin \"{}\" may not call this server (--cors-origin)",
                               view(x.request[http::field::origin]).substr(0, kMaxLoggedBytes)),
                   "", "origin_not_allowed");
  }
}

std::optional<HttpResponse> preflight(const Exchange& x) {
  const std::string_view headers = view(x.request[http::field::access_control_request_headers]);
  if (x.request.method() != http::verb::options || !may_read(x) ||
      x.request[http::field::access_control_request_method].empty()) {
    return {};
  }
  const std::string methods = allowed_methods(x);
  if (methods.empty()) throw ApiError(404, "invalid_request_error", "there is no such path");
  HttpResponse response(http::status::no_content, x.request.version());
  response.set(http::field::access_control_allow_methods, methods);
  // Clients send many of their own; a "*" would not stand for Authorization.
  if (!headers.empty() && is_list_of_names(headers)) {
    response.set(http::field::access_control_allow_headers,
                 boost::string_view(headers.data(), headers.size()));
  }
  response.set(http::field::access_control_max_age, "600");
  return response;
}

void add_cors_fields(const Exchange& x, http::fields& head) {
  if (x.shared.options.cors_origins.empty()) return;
  head.set(http::field::vary, "Origin");
  if (!may_read(x)) return;
  head.set(http::field::access_control_allow_origin, x.request[http::field::origin]);
  head.set(http::field::access_control_expose_headers, "x-request-id, retry-after, x-should-retry");
}

}  // namespace flash_mla::server
