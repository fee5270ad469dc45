#include "server/exchange.h"

#include <fmt/format.h>

#include "server/browser.h"
#include "server/watcher.h"

namespace flash_mla::server {

TimePoint Exchange::deadline() const {
  if (shared.options.request_timeout_seconds <= 0) return TimePoint::max();
  const std::chrono::duration<double> time(shared.options.request_timeout_seconds);
  return record.begin + std::chrono::duration_cast<TimePoint::duration>(time);
}

ApiError Exchange::too_late() const {
  return {504, "timeout_error",
          fmt::format("the answer took longer than {} s, this server's limit for a request",
                      shared.options.request_timeout_seconds),
          "", "timeout"};
}

void add_common_fields(const Exchange& x, http::fields& head) {
  head.set("x-request-id", x.record.id);
  add_cors_fields(x, head);
}

HttpResponse json_response(const HttpRequest& request, int status, const Json& body) {
  HttpResponse response(static_cast<http::status>(status), request.version());
  response.set(http::field::content_type, "application/json");
  response.body() = dump(body);
  return response;
}

awaitable<void> write(Exchange& x, HttpResponse& response, bool keep_alive) {
  add_common_fields(x, response);
  response.keep_alive(keep_alive);
  if (response.result() != http::status::no_content) response.prepare_payload();
  x.stream.expires_after(seconds(x.shared.options.write_timeout_seconds));
  if (x.request.method() == http::verb::head) {
    http::response_serializer<http::string_body> head(response);
    co_await http::async_write_header(x.stream, head, use_awaitable);
  } else {
    co_await http::async_write(x.stream, response, use_awaitable);
  }
  x.record.status = static_cast<int>(response.result_int());
}

void check_awaited(const Exchange& x) {
  if (has_hung_up(x.stream.socket().native_handle())) {
    throw boost::system::system_error(asio::error::connection_reset);
  }
  if (std::chrono::steady_clock::now() >= x.deadline()) throw x.too_late();
}

}  // namespace flash_mla::server
