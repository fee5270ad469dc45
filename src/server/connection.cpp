#include "server/connection.h"

#include <array>
#include <optional>

#include "server/browser.h"
#include "server/dialect.h"
#include "server/exchange.h"
#include "server/generate.h"
#include "server/headers.h"
#include "server/http_head.h"
#include "server/routes.h"
#include "server/watcher.h"

namespace flash_mla::server {
namespace {

using RequestParser = http::request_parser<http::string_body>;

/// What has been read of a connection and not used yet, and when its request began.
struct Input {
  explicit Input(std::size_t max_bytes) : buffer(max_bytes) {}
  std::string_view seen() const { return {static_cast<const char*>(buffer.data().data()), buffer.size()}; }

  beast::flat_buffer buffer;
  TimePoint begin{};
  std::string refused;  // why, if it is not the parser that says so
};

/// Reads a whole head and checks it: idle time until its first byte, which is its `begin`, then a bound on
/// all of the request however slowly it drips in.
awaitable<error_code> read_head(Shared& shared, beast::tcp_stream& stream, Input& input) {
  error_code error;
  if (input.buffer.size() == 0) {
    input.buffer.shrink_to_fit();  // a long prompt has left it large
    stream.expires_after(seconds(shared.options.idle_timeout_seconds));
    const std::size_t n =
        co_await stream.async_read_some(input.buffer.prepare(4096), redirect_error(use_awaitable, error));
    if (error) co_return http::error::end_of_stream;
    input.buffer.commit(n);
  }
  input.begin = std::chrono::steady_clock::now();
  stream.expires_after(seconds(shared.options.read_timeout_seconds));
  constexpr std::string_view kEnd = "\r\n\r\n";
  std::size_t end = 0, searched = 0;
  while ((end = input.seen().find(kEnd, searched)) == std::string_view::npos) {
    if (input.buffer.size() >= kMaxHeadBytes) co_return http::error::header_limit;
    searched = input.buffer.size() < kEnd.size() ? 0 : input.buffer.size() - kEnd.size();
    const std::size_t n =
        co_await stream.async_read_some(input.buffer.prepare(4096), redirect_error(use_awaitable, error));
    if (error == asio::error::eof) co_return http::error::partial_message;
    if (error) co_return error;
    input.buffer.commit(n);
  }
  if (end + kEnd.size() > kMaxHeadBytes) co_return http::error::header_limit;
  input.refused = head_error(input.seen().substr(0, end + kEnd.size()));
  co_return input.refused.empty() ? error_code() : error_code(http::error::bad_field);
}

/// `counted` from its head on: a server that shuts down reads the rest, too, and answers.
awaitable<error_code> read(Shared& shared, beast::tcp_stream& stream, Input& input, RequestParser& parser,
                           std::optional<Counted>& counted) {
  error_code error = co_await read_head(shared, stream, input);
  if (error) co_return error;
  counted.emplace(shared.num_calls);
  co_await http::async_read_header(stream, input.buffer, parser, redirect_error(use_awaitable, error));
  if (error) co_return error;
  // Some clients wait a second for this before they send a long body.
  if (!parser.is_done() && beast::iequals(parser.get()[http::field::expect], "100-continue")) {
    constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
    co_await asio::async_write(stream, asio::buffer(kContinue), redirect_error(use_awaitable, error));
    if (error) co_return error;
  }
  co_await http::async_read(stream, input.buffer, parser, redirect_error(use_awaitable, error));
  if (input.buffer.size() == 0) input.buffer.shrink_to_fit();
  co_return error;
}

/// Answers what is no request.
awaitable<void> refuse(Shared& shared, beast::tcp_stream& stream, int status, const std::string& message,
                       bool head = false) {
  RequestRecord record;
  record.id = request_id({});
  record.error = message;
  record.status = status;  // whether or not the client hears it
  HttpRequest empty;
  empty.version(11);
  if (head) empty.method(http::verb::head);
  const ApiError error(status, status == 503 ? "server_error" : "invalid_request_error", message);
  HttpResponse response = json_response(empty, status, error.body());
  if (status == 503) response.set(http::field::retry_after, "1");
  const Noted noted(shared, record);
  Exchange x{shared, stream, empty, record};
  co_await write(x, response, /*keep_alive=*/false);
  // Closing with bytes unread would reset the connection, and the answer with it: take what is still coming,
  // however much, for a moment.
  error_code error_of_close;
  stream.socket().shutdown(tcp::socket::shutdown_send, error_of_close);
  stream.expires_after(seconds(5));
  std::array<char, 16384> unread;
  while (!error_of_close) {
    co_await stream.async_read_some(asio::buffer(unread), redirect_error(use_awaitable, error_of_close));
  }
}

awaitable<void> refuse(Shared& shared, beast::tcp_stream& stream, const Input& input, error_code error,
                       bool head) {
  const int status = error == http::error::body_limit ? 413 : error == http::error::header_limit ? 431 : 400;
  const std::string why = input.refused.empty() ? error.message() : input.refused;
  const std::string message = "the request cannot be read: " + why;
  co_await refuse(shared, stream, status, message, head);
}

HttpResponse error_response(const Exchange& x, const ApiError& e) {
  HttpResponse response =
      json_response(x.request, e.status(), is_messages_path(x) ? messages_error(e, x.record.id) : e.body());
  // Done again it would only take as long again.
  if (e.status() == 504) response.set("x-should-retry", "false");
  if (e.status() == 429) response.set(http::field::retry_after, "1");
  if (e.status() == 401) response.set(http::field::www_authenticate, "Bearer realm=\"flash-mla\"");
  if (e.status() == 405) response.set(http::field::allow, allowed_methods(x));
  return response;
}

/// True if the connection may carry another request.
awaitable<bool> answer(Exchange& x) {
  HttpResponse response;
  try {
    check_site(x);
    if (std::optional<HttpResponse> permission = preflight(x)) {
      co_await write(x, *permission, x.request.keep_alive());
      co_return x.request.keep_alive();
    }
    const Route& route = find_route(x);
    if (route.generates != Route::Generates::kNothing) {
      co_return co_await generate(x, route.generates);
    }
    if (x.has_large_body()) {
      response = co_await on_body_thread(x, [&] { return route.respond(x); });
    } else {
      response = route.respond(x);
    }
  } catch (const ApiError& e) {
    x.record.error = e.what();
    response = error_response(x, e);
  } catch (const boost::system::system_error&) {
    throw;  // the connection is broken
  } catch (const std::exception& e) {
    x.record.error = e.what();
    // What went wrong inside is nobody's business outside.
    response = error_response(x, ApiError(500, "server_error", "internal error"));
  }
  const bool keep_alive = x.request.keep_alive() && !x.shared.draining;
  co_await write(x, response, keep_alive);
  co_return keep_alive;
}

/// Reads and answers one request. True if the connection may carry another.
awaitable<bool> serve_request(Shared& shared, beast::tcp_stream& stream, Input& input) {
  RequestParser parser;
  parser.header_limit(kMaxHeadBytes);
  parser.body_limit(shared.options.max_body_bytes);
  std::optional<Counted> counted;
  const error_code error = co_await read(shared, stream, input, parser, counted);
  if (error == http::error::end_of_stream || error == beast::error::timeout) co_return false;
  if (error) {
    const bool head = parser.get().method() == http::verb::head || input.seen().starts_with("HEAD ");
    co_await refuse(shared, stream, input, error, head);
    co_return false;
  }
  HttpRequest request = parser.release();
  RequestRecord record;
  record.begin = input.begin;
  record.id = request_id(view(request["x-request-id"]));
  record.method = std::string(request.method_string());
  record.path = std::string(path_of(view(request.target())));
  const Noted noted(shared, record);
  Exchange x{shared, stream, request, record};
  const bool more = co_await answer(x);
  // A watcher may have seen the end of input in the meantime. Asio would not look for it again: the next read
  // would wait for an edge that has passed.
  co_return more && !(record.generates && has_hung_up(stream.socket().native_handle()));
}

}  // namespace

awaitable<void> serve_connection(Shared& shared, beast::tcp_stream stream) {
  const Counted counted(shared.num_connections);
  Input input(kMaxHeadBytes + shared.options.max_body_bytes);
  try {
    bool more = shared.num_connections <= shared.options.max_connections;
    if (!more) co_await refuse(shared, stream, 503, "too many connections");
    while (more) more = co_await serve_request(shared, stream, input);
  } catch (const boost::system::system_error&) {
    // The client is gone; its requests have been cancelled on the way here.
  }
  error_code ignored;
  stream.socket().shutdown(tcp::socket::shutdown_both, ignored);
  stream.close();
}

}  // namespace flash_mla::server
