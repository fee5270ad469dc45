#pragma once

#include <type_traits>

#include "server/api_error.h"
#include "server/http_types.h"
#include "server/shared.h"

namespace flash_mla::server {

/// One request of a connection, and what its answer needs.
struct Exchange {
  Shared& shared;
  beast::tcp_stream& stream;
  HttpRequest& request;
  RequestRecord& record;

  bool has_large_body() const { return request.body().size() > kMaxInlineBodyBytes; }
  /// When this server gives up: max() for never.
  TimePoint deadline() const;
  ApiError too_late() const;
};

/// Sets what every answer carries: the request's id, and what a browser must know (CORS).
void add_common_fields(const Exchange& x, http::fields& head);

HttpResponse json_response(const HttpRequest& request, int status, const Json& body);

/// Sends an answer; of one to HEAD only its head.
awaitable<void> write(Exchange& x, HttpResponse& response, bool keep_alive);

/// Throws as an answer would end: the client has left, or its time is over.
void check_awaited(const Exchange& x);

/// Does `work` for an exchange with a large body on a thread where it holds up no other connection, in the
/// order of arrival. What nobody waits for any more is not begun.
template <typename Work>
awaitable<std::invoke_result_t<Work&>> on_body_thread(Exchange& x, Work work) {
  x.stream.expires_never();
  const auto job = [&x, &work]() -> awaitable<std::invoke_result_t<Work&>> {
    check_awaited(x);
    co_return work();
  };
  co_return co_await asio::co_spawn(x.shared.body_threads->get_executor(), job, use_awaitable);
}

}  // namespace flash_mla::server
