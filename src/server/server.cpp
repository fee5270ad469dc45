#include "server/server.h"

#include <fmt/format.h>
#include <poll.h>

#include <array>
#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <deque>
#include <mutex>
#include <thread>

#include "flash_mla/error.h"
#include "flash_mla_status_page.h"
#include "server/api.h"
#include "server/headers.h"
#include "server/request_log.h"

namespace flash_mla::server {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using asio::redirect_error;
using asio::use_awaitable;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using std::chrono::seconds;

using HttpRequest = http::request<http::string_body>;
using HttpResponse = http::response<http::string_body>;
using TimePoint = std::chrono::steady_clock::time_point;
using RequestParser = http::request_parser<http::string_body>;

constexpr std::uint32_t kMaxHeaderBytes = 16 * 1024;

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string_view view(boost::string_view text) { return {text.data(), text.size()}; }

// Events on their way from the engine's thread to a connection's. The engine only appends and rings.
class Mailbox : public std::enable_shared_from_this<Mailbox> {
 public:
  explicit Mailbox(const asio::any_io_executor& executor)
      : executor_(executor), bell_(executor, asio::steady_timer::time_point::max()) {}

  // From any thread.
  void put(int index, const GenerationEvent& event) {
    bool ring = false;
    {
      const std::lock_guard lock(mutex_);
      ring = events_.empty();
      events_.emplace_back(index, event);
    }
    if (ring) asio::post(executor_, [self = shared_from_this()] { self->bell_.cancel(); });
  }

  // On the connection's strand, as everything below. `deadline`: when take() gives up.
  void set_deadline(asio::steady_timer::time_point deadline) { deadline_ = deadline; }
  bool late() const { return asio::steady_timer::clock_type::now() >= deadline_; }
  void client_left() {
    gone_ = true;
    bell_.cancel();
  }
  bool gone() const { return gone_; }
  /// Nobody takes from here any more.
  void close() { closed_ = true; }
  bool closed() const { return closed_; }

  /// Waits for events; empty if the client went away or the deadline has passed.
  awaitable<std::deque<std::pair<int, GenerationEvent>>> take() {
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        if (gone_ || late()) co_return std::deque<std::pair<int, GenerationEvent>>();
        if (!events_.empty()) co_return std::exchange(events_, {});
      }
      bell_.expires_at(deadline_);
      error_code rung;
      co_await bell_.async_wait(redirect_error(use_awaitable, rung));
    }
  }

 private:
  asio::any_io_executor executor_;
  asio::steady_timer bell_;
  std::mutex mutex_;
  std::deque<std::pair<int, GenerationEvent>> events_;
  bool gone_ = false, closed_ = false;
  asio::steady_timer::time_point deadline_ = asio::steady_timer::time_point::max();
};

void bind_to_address(tcp::acceptor& acceptor, const ServerOptions& options) {
  error_code error;
  const auto address = asio::ip::make_address(options.host, error);
  if (error) throw InvalidArgument(fmt::format("host is \"{}\", expected an IP address", options.host));
  const tcp::endpoint endpoint(address, static_cast<unsigned short>(options.port));
  acceptor.open(endpoint.protocol());
  acceptor.set_option(asio::socket_base::reuse_address(true));
  acceptor.bind(endpoint, error);
  if (error) {
    throw std::runtime_error(
        fmt::format("{}:{} cannot be bound: {}", options.host, options.port, error.message()));
  }
}

}  // namespace

void check_address(const ServerOptions& options) {
  asio::io_context context;
  tcp::acceptor acceptor(context);
  bind_to_address(acceptor, options);
}

struct Server::Impl {
  Impl(Engine& served, const ServerOptions& o)
      : engine(served),
        options(o),
        control(asio::make_strand(context)),
        acceptor(control),
        signals(control, SIGINT, SIGTERM) {
    bind_to_address(acceptor, options);
    acceptor.listen(asio::socket_base::max_listen_connections);
  }

  awaitable<void> accept();
  awaitable<void> wait_for_signals();
  awaitable<void> stop_when_drained();
  awaitable<void> connection(beast::tcp_stream stream);
  awaitable<error_code> read(beast::tcp_stream& stream, beast::flat_buffer& buffer, RequestParser& parser,
                             TimePoint& begin);
  awaitable<void> refuse(beast::tcp_stream& stream, int status, const std::string& message);
  awaitable<bool> answer(beast::tcp_stream& stream, HttpRequest& request, RequestRecord& record);
  awaitable<bool> generate(beast::tcp_stream& stream, HttpRequest& request, bool chat, RequestRecord& record);
  awaitable<void> write(beast::tcp_stream& stream, HttpResponse& response, bool keep_alive,
                        RequestRecord& record);
  void note(const RequestRecord& record);
  HttpStats http_stats();
  HttpResponse simple(const HttpRequest& request);
  HttpResponse json_response(const HttpRequest& request, int status, const Json& body);
  void authorise(const HttpRequest& request) const;
  Json tokenize(const HttpRequest& request) const;

  Engine& engine;
  ServerOptions options;
  std::atomic<int> num_connections = 0;
  std::atomic<int> num_calls = 0;
  std::atomic<bool> draining = false;
  std::atomic<std::uint64_t> next_call = 1;
  std::mutex responses_mutex;
  std::map<int, std::int64_t> responses;  // by status
  std::int64_t created =
      std::chrono::duration_cast<seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  // After all that connections use: a second signal leaves them to this one's destructor.
  asio::io_context context;
  // Accepting and stopping, one at a time: they share the acceptor.
  asio::strand<asio::io_context::executor_type> control;
  tcp::acceptor acceptor;
  asio::signal_set signals;
};

namespace {

/// Counts something for as long as it lives.
class Counted {
 public:
  explicit Counted(std::atomic<int>& count) : count_(count) { ++count_; }
  ~Counted() { --count_; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::atomic<int>& count_;
};

/// The engine requests of one call; whatever has not ended when it goes is cancelled.
class Submitted {
 public:
  Submitted(Engine& engine) : engine_(engine) {}
  ~Submitted() {
    for (const RequestId id : ids_) engine_.cancel(id);  // without effect on those that have ended
  }
  Submitted(const Submitted&) = delete;
  Submitted& operator=(const Submitted&) = delete;

  void submit(std::vector<Request> requests, const std::shared_ptr<Mailbox>& mailbox) {
    int first = 0;
    for (Request& request : requests) {
      const int n = request.sampling.n;
      ids_.push_back(engine_.submit(std::move(request), [mailbox, first](const GenerationEvent& e) {
        mailbox->put(first + e.index, e);
      }));
      first += n;
    }
  }

 private:
  Engine& engine_;
  std::vector<RequestId> ids_;
};

/// Whether the other side has closed, though bytes that it sent before still wait to be read.
bool has_hung_up(tcp::socket& socket) {
  pollfd wanted{socket.native_handle(), POLLRDHUP, 0};
  return ::poll(&wanted, 1, 0) != 0;
}

awaitable<void> watch(beast::tcp_stream& stream, std::shared_ptr<Mailbox> mailbox) {
  char byte = 0;
  error_code error;
  co_await stream.socket().async_receive(asio::buffer(&byte, 1), asio::socket_base::message_peek,
                                         redirect_error(use_awaitable, error));
  // Behind the next request, sent early, an end of input cannot be waited for.
  asio::steady_timer timer(co_await asio::this_coro::executor);
  while (!error && !mailbox->closed() && !has_hung_up(stream.socket())) {
    timer.expires_after(std::chrono::milliseconds(100));
    co_await timer.async_wait(redirect_error(use_awaitable, error));
  }
  if (!mailbox->closed()) mailbox->client_left();
}

/// Watches, while a call runs, for its client going away.
class Watcher {
 public:
  Watcher(beast::tcp_stream& stream, std::shared_ptr<Mailbox> mailbox)
      : stream_(stream), mailbox_(std::move(mailbox)) {
    asio::co_spawn(stream.get_executor(), watch(stream, mailbox_), asio::detached);
  }
  // It must not read beside the next request. What still runs of it touches nothing but its mailbox.
  ~Watcher() {
    mailbox_->close();
    error_code ignored;
    stream_.socket().cancel(ignored);
  }
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

 private:
  beast::tcp_stream& stream_;
  std::shared_ptr<Mailbox> mailbox_;
};

/// Sends what the socket takes at once, which is nearly always all, without the timer and the round through
/// the scheduler that waiting costs.
template <typename Buffers>
awaitable<void> send_event(beast::tcp_stream& stream, Buffers buffers, int timeout_seconds) {
  error_code error;
  const std::size_t sent = stream.socket().write_some(buffers, error);
  if (error && error != asio::error::would_block) throw boost::system::system_error(error);
  if (sent == asio::buffer_size(buffers)) co_return;
  beast::buffers_suffix<Buffers> rest(buffers);
  rest.consume(sent);
  stream.expires_after(seconds(timeout_seconds));
  co_await asio::async_write(stream, rest, use_awaitable);
  stream.expires_never();
}

}  // namespace

HttpResponse Server::Impl::json_response(const HttpRequest& request, int status, const Json& body) {
  HttpResponse response(static_cast<http::status>(status), request.version());
  response.set(http::field::content_type, "application/json");
  response.body() = dump(body);
  return response;
}

void Server::Impl::authorise(const HttpRequest& request) const {
  if (options.api_keys.empty()) return;
  if (!is_known_key(bearer_key(view(request[http::field::authorization])), options.api_keys)) {
    throw ApiError(401, "invalid_request_error", "the API key is missing or wrong", "", "invalid_api_key");
  }
}

Json Server::Impl::tokenize(const HttpRequest& request) const {
  const std::string prompt = parse_tokenize(request.body());
  try {
    const std::vector<std::int32_t> ids =
        engine.tokenize(prompt, /*add_special_tokens=*/true, /*allow_special=*/false);
    return {{"count", ids.size()}, {"max_model_len", engine.max_length()}, {"tokens", ids}};
  } catch (const InvalidArgument& e) {
    throw bad_request(e.what(), "prompt");
  }
}

HttpResponse Server::Impl::simple(const HttpRequest& request) {
  const std::string target(path_of(view(request.target())));
  const auto text = [&](const char* type, std::string body) {
    HttpResponse response(http::status::ok, request.version());
    response.set(http::field::content_type, type);
    response.body() = std::move(body);
    return response;
  };
  const bool get = request.method() == http::verb::get;
  if (get && target == "/health") return json_response(request, 200, {{"status", "ok"}});
  if (get && target == "/ready") {
    return draining ? json_response(request, 503, {{"status", "draining"}})
                    : json_response(request, 200, {{"status", "ready"}});
  }
  if (get && target == "/metrics")
    return text("text/plain; version=0.0.4", prometheus_text(engine.stats(), http_stats()));
  if (get && target == "/") {
    HttpResponse page = text("text/html; charset=utf-8", kStatusPage);
    page.set("content-security-policy",
             "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
             "img-src data:; "
             "frame-ancestors 'none'");
    return page;
  }
  authorise(request);
  if (get && target == "/trace") return text("application/json", engine.chrome_trace());
  const Json model = {{"id", options.model_name},
                      {"object", "model"},
                      {"created", created},
                      {"owned_by", "flash_mla"},
                      {"max_model_len", engine.max_length()}};
  if (get && target == "/v1/models") {
    return json_response(request, 200, {{"object", "list"}, {"data", Json::array({model})}});
  }
  if (get && target == "/v1/models/" + options.model_name) return json_response(request, 200, model);
  if (request.method() == http::verb::post && target == "/v1/tokenize") {
    return json_response(request, 200, tokenize(request));
  }
  for (const char* known : {"/", "/health", "/ready", "/metrics", "/trace", "/v1/models", "/v1/tokenize",
                            "/v1/completions", "/v1/chat/completions"}) {
    if (target == known) {
      throw ApiError(405, "invalid_request_error",
                     fmt::format("{} is not a method of {}", std::string(request.method_string()), target));
    }
  }
  throw ApiError(404, "invalid_request_error", "there is no such path");
}

void Server::Impl::note(const RequestRecord& record) {
  {
    const std::lock_guard lock(responses_mutex);
    ++responses[record.status];
  }
  // One call, so that lines of several threads do not mix.
  if (!options.log_requests) return;
  const std::string line = log_line(record);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

HttpStats Server::Impl::http_stats() {
  const std::lock_guard lock(responses_mutex);
  return {responses, num_connections};
}

awaitable<void> Server::Impl::write(beast::tcp_stream& stream, HttpResponse& response, bool keep_alive,
                                    RequestRecord& record) {
  response.set("x-request-id", record.id);
  response.keep_alive(keep_alive);
  response.prepare_payload();
  stream.expires_after(seconds(options.write_timeout_seconds));
  co_await http::async_write(stream, response, use_awaitable);
  record.status = response.result_int();
}

/// Logs a request and counts it, however its answer ended.
class Server::Noted {
 public:
  Noted(Impl& impl, const RequestRecord& record) : impl_(impl), record_(record) {}
  ~Noted() { impl_.note(record_); }
  Noted(const Noted&) = delete;
  Noted& operator=(const Noted&) = delete;

 private:
  Impl& impl_;
  const RequestRecord& record_;
};

// True if the connection may carry another request.
awaitable<bool> Server::Impl::generate(beast::tcp_stream& stream, HttpRequest& request, bool chat,
                                       RequestRecord& record) {
  authorise(request);
  if (draining) throw ApiError(503, "server_error", "the server is shutting down");
  Call call = parse_call(request.body(), chat, options.model_name);
  request.body() = std::string();  // a stream may wait for long, with a long prompt
  record.generates = true;
  record.stream = call.stream;
  record.num_choices = call.num_choices;
  const Counted counted(num_calls);
  const auto mailbox = std::make_shared<Mailbox>(stream.get_executor());
  if (options.request_timeout_seconds > 0) {
    mailbox->set_deadline(record.begin + std::chrono::duration_cast<asio::steady_timer::duration>(
                                             std::chrono::duration<double>(options.request_timeout_seconds)));
  }
  Submitted submitted(engine);
  try {
    submitted.submit(std::move(call.requests), mailbox);
  } catch (const InvalidArgument& e) {
    throw bad_request(e.what(), chat ? "messages" : "prompt");  // all else has been checked
  } catch (const Unsupported& e) {
    throw bad_request(e.what(), chat ? "messages" : "prompt");
  } catch (const Overloaded& e) {
    throw ApiError(429, "rate_limit_error", e.what(), "", "overloaded");
  }
  const std::string id = fmt::format("{}-{:x}-{}", chat ? "chatcmpl" : "cmpl", created, next_call++);
  const std::int64_t now =
      std::chrono::duration_cast<seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  Answer answer(call, id, options.model_name, now, engine);
  stream.expires_never();
  const Watcher watcher(stream, mailbox);
  // Without chunks the end of a stream is the end of the connection.
  const bool keep_alive = request.keep_alive() && !draining && !(call.stream && request.version() < 11);

  if (call.stream) {
    http::response<http::empty_body> head(http::status::ok, request.version());
    head.set(http::field::content_type, "text/event-stream");
    head.set(http::field::cache_control, "no-cache");
    head.set("x-request-id", record.id);
    head.keep_alive(keep_alive);
    head.chunked(request.version() >= 11);
    http::response_serializer<http::empty_body> serializer(head);
    co_await http::async_write_header(stream, serializer, use_awaitable);
  }
  int open = call.num_choices;
  while (open > 0) {
    const auto events = co_await mailbox->take();
    if (mailbox->gone()) co_return false;
    std::string out;
    if (events.empty()) {
      const ApiError late(504, "timeout_error",
                          fmt::format("the answer took longer than {} s, this server's limit for a request",
                                      options.request_timeout_seconds),
                          "", "timeout");
      if (!call.stream) throw late;
      record.error = late.what();
      out = "data: " + dump(late.body()) + "\n\ndata: [DONE]\n\n";
      open = 0;
    } else if (record.first_event_seconds < 0) {
      record.first_event_seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - record.begin).count();
    }
    for (const auto& [index, event] : events) {
      open -= event.finish != FinishReason::kNone;
      if (!call.stream) {
        answer.collect(index, event);
        continue;
      }
      if (event.finish == FinishReason::kError) {
        record.error = event.error;
        out += "data: " + dump(ApiError(500, "server_error", event.error).body()) + "\n\n";
      } else if (event.finish != FinishReason::kNone || !event.text.empty() || !event.logprobs.empty()) {
        out += "data: " + dump(answer.chunk(index, event)) + "\n\n";
      }
    }
    if (!call.stream) continue;
    record.usage = answer.tokens();
    if (open == 0 && !events.empty()) {
      if (call.include_usage) out += "data: " + dump(answer.usage_chunk()) + "\n\n";
      out += "data: [DONE]\n\n";
    }
    if (out.empty()) continue;
    if (request.version() >= 11) {
      co_await send_event(stream, http::make_chunk(asio::buffer(out)), options.write_timeout_seconds);
    } else {
      co_await send_event(stream, asio::const_buffers_1(asio::buffer(out)), options.write_timeout_seconds);
    }
  }
  record.usage = answer.tokens();
  if (call.stream) {
    if (request.version() >= 11) {
      stream.expires_after(seconds(options.write_timeout_seconds));
      co_await asio::async_write(stream, http::make_chunk_last(), use_awaitable);
    }
    record.status = 200;
    co_return keep_alive;
  }
  HttpResponse response = json_response(request, 200, answer.complete());
  co_await write(stream, response, keep_alive, record);
  co_return keep_alive;
}

// True if the connection may carry another request.
awaitable<bool> Server::Impl::answer(beast::tcp_stream& stream, HttpRequest& request, RequestRecord& record) {
  const std::string target(path_of(view(request.target())));
  HttpResponse response;
  try {
    if (request.method() == http::verb::post &&
        (target == "/v1/completions" || target == "/v1/chat/completions")) {
      co_return co_await generate(stream, request, target == "/v1/chat/completions", record);
    }
    response = simple(request);
  } catch (const ApiError& e) {
    record.error = e.what();
    response = json_response(request, e.status(), e.body());
    // Done again it would only take as long again.
    if (e.status() == 504) response.set("x-should-retry", "false");
    if (e.status() == 429) response.set(http::field::retry_after, "1");
  } catch (const boost::system::system_error&) {
    throw;  // the connection is broken
  } catch (const std::exception& e) {
    record.error = e.what();
    // What went wrong inside is nobody's business outside.
    response = json_response(request, 500, ApiError(500, "server_error", "internal error").body());
  }
  // The body that answers HEAD all the same would be taken for the next answer.
  const bool keep_alive = request.keep_alive() && !draining && request.method() != http::verb::head;
  co_await write(stream, response, keep_alive, record);
  co_return keep_alive;
}

/// Answers what is no request.
awaitable<void> Server::Impl::refuse(beast::tcp_stream& stream, int status, const std::string& message) {
  RequestRecord record;
  record.id = request_id({});
  record.error = message;
  record.status = status;  // whether or not the client hears it
  HttpRequest empty;
  empty.version(11);
  const ApiError error(status, status == 503 ? "server_error" : "invalid_request_error", message);
  HttpResponse response = json_response(empty, status, error.body());
  if (status == 503) response.set(http::field::retry_after, "1");
  const Noted noted(*this, record);
  co_await write(stream, response, /*keep_alive=*/false, record);
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

/// Reads a request: idle time until its first byte, which is its `begin`, then a bound on all of it however
/// slowly it drips in.
awaitable<error_code> Server::Impl::read(beast::tcp_stream& stream, beast::flat_buffer& buffer,
                                         RequestParser& parser, TimePoint& begin) {
  error_code error;
  if (buffer.size() == 0) {
    buffer.shrink_to_fit();  // a long prompt has left it large
    stream.expires_after(seconds(options.idle_timeout_seconds));
    const std::size_t n =
        co_await stream.async_read_some(buffer.prepare(4096), redirect_error(use_awaitable, error));
    if (error) co_return http::error::end_of_stream;
    buffer.commit(n);
  }
  begin = std::chrono::steady_clock::now();
  stream.expires_after(seconds(options.read_timeout_seconds));
  co_await http::async_read_header(stream, buffer, parser, redirect_error(use_awaitable, error));
  if (error) co_return error;
  // Some clients wait a second for this before they send a long body.
  if (!parser.is_done() && beast::iequals(parser.get()[http::field::expect], "100-continue")) {
    constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
    co_await asio::async_write(stream, asio::buffer(kContinue), redirect_error(use_awaitable, error));
    if (error) co_return error;
  }
  co_await http::async_read(stream, buffer, parser, redirect_error(use_awaitable, error));
  if (buffer.size() == 0) buffer.shrink_to_fit();
  co_return error;
}

awaitable<void> Server::Impl::connection(beast::tcp_stream stream) {
  const Counted counted(num_connections);
  beast::flat_buffer buffer(kMaxHeaderBytes + options.max_body_bytes);
  try {
    bool more = num_connections <= options.max_connections;
    if (!more) co_await refuse(stream, 503, "too many connections");
    while (more) {
      RequestParser parser;
      parser.header_limit(kMaxHeaderBytes);
      parser.body_limit(options.max_body_bytes);
      TimePoint begin;
      const error_code error = co_await read(stream, buffer, parser, begin);
      if (error == http::error::end_of_stream || error == beast::error::timeout) break;
      if (error) {
        const int status = error == http::error::body_limit     ? 413
                           : error == http::error::header_limit ? 431
                                                                : 400;
        co_await refuse(stream, status, "the request cannot be read: " + error.message());
        break;
      }
      HttpRequest request = parser.release();
      RequestRecord record;
      record.begin = begin;
      record.id = request_id(view(request["x-request-id"]));
      record.method = std::string(request.method_string());
      record.path = std::string(path_of(view(request.target())));
      const Noted noted(*this, record);
      more = co_await answer(stream, request, record);
      // A watcher may have seen the end of input in the meantime. Asio would not look for it again: the next
      // read would wait for an edge that has passed.
      more = more && !(record.generates && has_hung_up(stream.socket()));
    }
  } catch (const boost::system::system_error&) {
    // The client is gone; its requests have been cancelled on the way here.
  }
  error_code ignored;
  stream.socket().shutdown(tcp::socket::shutdown_both, ignored);
  stream.close();
}

awaitable<void> Server::Impl::accept() {
  asio::steady_timer pause(control);
  for (;;) {
    error_code error;
    tcp::socket socket(asio::make_strand(context));
    co_await acceptor.async_accept(socket, redirect_error(use_awaitable, error));
    if (!acceptor.is_open()) co_return;
    if (error) {
      // Out of file descriptors, most likely: give others time to close.
      pause.expires_after(std::chrono::milliseconds(50));
      co_await pause.async_wait(redirect_error(use_awaitable, error));
      continue;
    }
    socket.set_option(tcp::no_delay(true), error);
    socket.non_blocking(true, error);
    const auto executor = socket.get_executor();
    asio::co_spawn(executor, connection(beast::tcp_stream(std::move(socket))), asio::detached);
  }
}

awaitable<void> Server::Impl::stop_when_drained() {
  asio::steady_timer pause(control);
  error_code ignored;
  while (num_calls > 0) {
    pause.expires_after(std::chrono::milliseconds(20));
    co_await pause.async_wait(redirect_error(use_awaitable, ignored));
  }
  // Time for the last bytes to leave.
  pause.expires_after(std::chrono::milliseconds(50));
  co_await pause.async_wait(redirect_error(use_awaitable, ignored));
  context.stop();
}

awaitable<void> Server::Impl::wait_for_signals() {
  error_code error;
  co_await signals.async_wait(redirect_error(use_awaitable, error));
  draining = true;
  acceptor.close(error);
  fmt::print(stderr, "flash-mla serve: finishing {} requests; a second signal stops at once\n",
             num_calls.load());
  // Whichever comes first: the last call ends, or the second signal.
  asio::co_spawn(control, stop_when_drained(), asio::detached);
  co_await signals.async_wait(redirect_error(use_awaitable, error));
  if (!error) context.stop();
}

Server::Server(Engine& engine, const ServerOptions& options)
    : impl_(std::make_unique<Impl>(engine, options)) {}
Server::~Server() = default;

int Server::port() const { return impl_->acceptor.local_endpoint().port(); }

void Server::run() {
  asio::co_spawn(impl_->control, impl_->accept(), asio::detached);
  asio::co_spawn(impl_->control, impl_->wait_for_signals(), asio::detached);
  std::vector<std::jthread> threads;
  for (int i = 1; i < impl_->options.num_threads; ++i) threads.emplace_back([this] { impl_->context.run(); });
  impl_->context.run();
}

}  // namespace flash_mla::server
