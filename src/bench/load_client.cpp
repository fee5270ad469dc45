#include "bench/load_client.h"

#include <fmt/format.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using asio::redirect_error;
using asio::use_awaitable;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;

Clock::duration duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

http::request<http::string_body> make_request(const LoadTarget& target, const std::string& path,
                                              const std::string& body) {
  http::request<http::string_body> out(body.empty() ? http::verb::get : http::verb::post, path, 11);
  out.set(http::field::host, target.host);
  out.set(http::field::content_type, "application/json");
  if (!target.api_key.empty()) out.set(http::field::authorization, "Bearer " + target.api_key);
  out.body() = body;
  out.prepare_payload();
  return out;
}

// A streaming /v1/completions call that tells its usage.
std::string completion_body(const LoadRequest& r, const std::string& model) {
  return Json{{"model", model},
              {"prompt", r.prompt},
              {"max_tokens", r.max_tokens},
              {"temperature", 0},
              {"ignore_eos", true},
              {"stream", true},
              {"stream_options", {{"include_usage", true}}}}
      .dump();
}

tcp::resolver::results_type resolve(asio::io_context& context, const LoadTarget& target) {
  error_code error;
  auto found = tcp::resolver(context).resolve(target.host, target.port, error);
  if (error) {
    throw std::runtime_error(
        fmt::format("{}:{} cannot be found: {}", target.host, target.port, error.message()));
  }
  return found;
}

std::string message_of(const std::string& body) {
  const Json json = Json::parse(body, nullptr, false);
  if (json.is_object() && json.contains("error") && json["error"].is_object()) {
    const Json& message = json["error"]["message"];
    if (message.is_string()) return message.get<std::string>();
  }
  return body.substr(0, 200);
}

/// Takes server-sent events apart as they arrive.
class Events {
 public:
  /// `time`: now. False once the stream has ended with [DONE].
  void take(std::string_view text, double time, LoadRequest& r) {
    pending_ += text;
    std::size_t end = 0;
    while ((end = pending_.find("\n\n")) != std::string::npos) {
      event(std::string_view(pending_).substr(0, end), time, r);
      pending_.erase(0, end + 2);
    }
  }
  bool done() const { return done_; }

 private:
  void event(std::string_view text, double time, LoadRequest& r) {
    constexpr std::string_view kData = "data: ";
    if (!text.starts_with(kData)) return;
    text.remove_prefix(kData.size());
    if (text == "[DONE]") {
      done_ = true;
      return;
    }
    const Json json = Json::parse(text, nullptr, false);
    if (!json.is_object()) {
      r.error = "an event is not a JSON object";
      return;
    }
    if (json.contains("error")) r.error = message_of(std::string(text));
    if (json.contains("usage") && json["usage"].is_object()) {
      r.prompt_tokens = json["usage"].value("prompt_tokens", std::int64_t{0});
      r.completion_tokens = json["usage"].value("completion_tokens", std::int64_t{0});
    }
    if (json.contains("choices") && json["choices"].is_array() && !json["choices"].empty()) {
      if (r.first == 0) r.first = time;
      r.last = time;
    }
  }

  std::string pending_;
  bool done_ = false;
};

class Run {
 public:
  Run(const LoadOptions& options, std::vector<LoadRequest>& requests,
      const std::function<void(std::size_t)>& progress)
      : options_(options),
        requests_(requests),
        progress_(progress),
        addresses_(resolve(context_, options.target)),
        timer_(context_),
        due_timer_(context_) {
    // Before the clock runs: what takes time here is the server's answer.
    for (const LoadRequest& r : requests) bodies_.push_back(completion_body(r, options.model));
  }

  double run() {
    begin_ = Clock::now();
    asio::co_spawn(context_, report(), asio::detached);
    if (options_.open_loop) {
      asio::co_spawn(context_, send_when_due(), asio::detached);
    } else {
      for (int i = 0; i < options_.clients; ++i) asio::co_spawn(context_, client(), asio::detached);
    }
    context_.run();
    progress_(done_);
    return finished_;
  }

 private:
  using Stream = std::optional<beast::tcp_stream>;

  double now() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

  awaitable<void> report() {
    while (done_ < requests_.size()) {
      progress_(done_);
      timer_.expires_after(std::chrono::milliseconds(200));
      error_code cancelled;
      co_await timer_.async_wait(redirect_error(use_awaitable, cancelled));
    }
  }

  void count() {
    finished_ = now();
    if (++done_ == requests_.size()) timer_.cancel();
  }

  awaitable<void> client() {
    Stream stream;
    while (next_ < requests_.size()) {
      LoadRequest& r = requests_[next_++];
      r.begin = now();
      co_await send(stream, r);
    }
  }

  awaitable<void> send_when_due() {
    for (LoadRequest& r : requests_) {
      due_timer_.expires_at(begin_ + duration(r.due));
      error_code cancelled;
      co_await due_timer_.async_wait(redirect_error(use_awaitable, cancelled));
      r.begin = r.due;
      asio::co_spawn(context_, send_one(r), asio::detached);
    }
  }

  awaitable<void> send_one(LoadRequest& r) {
    Stream stream = take_idle();
    co_await send(stream, r);
    if (stream) idle_.push_back(std::move(*stream));
  }

  Stream take_idle() {
    if (idle_.empty()) return std::nullopt;
    Stream out(std::move(idle_.back()));
    idle_.pop_back();
    return out;
  }

  // Leaves a stream that can carry another request, or none.
  awaitable<void> send(Stream& stream, LoadRequest& r) {
    bool reusable = false;
    try {
      reusable = co_await exchange(stream, r);
    } catch (const boost::system::system_error& e) {
      r.error = e.code() == beast::error::timeout
                    ? fmt::format("no answer within {} s", options_.timeout_seconds)
                    : e.code().message();
    }
    r.end = now();
    if (!reusable) stream.reset();
    count();
  }

  awaitable<bool> exchange(Stream& stream, LoadRequest& r) {
    const Clock::time_point deadline = Clock::now() + duration(options_.timeout_seconds);
    if (!stream) {
      stream.emplace(context_);
      stream->expires_at(deadline);
      co_await stream->async_connect(addresses_, use_awaitable);
      stream->socket().set_option(tcp::no_delay(true));
    }
    stream->expires_at(deadline);
    auto request = make_request(options_.target, "/v1/completions",
                                bodies_[static_cast<std::size_t>(&r - requests_.data())]);
    co_await http::async_write(*stream, request, use_awaitable);

    beast::flat_buffer buffer;
    http::response_parser<http::string_body> parser;
    parser.body_limit(std::numeric_limits<std::uint64_t>::max());  // Boost 1.74 takes "none" for 0
    co_await http::async_read_header(*stream, buffer, parser, use_awaitable);
    r.status = parser.get().result_int();
    Events events;
    std::string& body = parser.get().body();
    while (!parser.is_done()) {
      co_await http::async_read_some(*stream, buffer, parser, use_awaitable);
      if (r.status != 200) continue;
      events.take(body, now(), r);
      body.clear();
    }
    if (r.status != 200) {
      r.error = message_of(body);
    } else if (r.error.empty() && !(events.done() && r.first > 0 && r.completion_tokens > 0)) {
      r.error = "the stream ended before its last event";
    }
    co_return parser.get().keep_alive();
  }

  const LoadOptions& options_;
  std::vector<LoadRequest>& requests_;
  const std::function<void(std::size_t)>& progress_;
  std::vector<std::string> bodies_;  // of the requests
  asio::io_context context_;
  tcp::resolver::results_type addresses_;
  asio::steady_timer timer_, due_timer_;
  std::vector<beast::tcp_stream> idle_;
  Clock::time_point begin_;
  std::size_t next_ = 0, done_ = 0;
  double finished_ = 0;
};

}  // namespace

LoadTarget parse_target(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  std::string_view rest = url;
  const auto fail = [&] {
    return InvalidArgument(fmt::format("--url {}: expected http://HOST[:PORT]", url));
  };
  if (!rest.starts_with(kScheme)) throw fail();
  rest.remove_prefix(kScheme.size());
  if (rest.ends_with('/')) rest.remove_suffix(1);
  LoadTarget out;
  out.port = "80";
  if (const std::size_t colon = rest.rfind(':'); colon != rest.npos && !rest.ends_with(']')) {
    out.port = rest.substr(colon + 1);
    rest = rest.substr(0, colon);
    if (out.port.empty() || out.port.find_first_not_of("0123456789") != out.port.npos) throw fail();
  }
  if (rest.starts_with('[') && rest.ends_with(']')) rest = rest.substr(1, rest.size() - 2);  // IPv6
  if (rest.empty() || rest.find('/') != rest.npos) throw fail();
  out.host = rest;
  return out;
}

double run_load(const LoadOptions& options, std::vector<LoadRequest>& requests,
                const std::function<void(std::size_t)>& progress) {
  return requests.empty() ? 0 : Run(options, requests, progress).run();
}

Json call_server(const LoadTarget& target, const std::string& path, const std::string& body) {
  asio::io_context context;
  beast::tcp_stream stream(context);
  http::response<http::string_body> response;
  try {
    stream.connect(resolve(context, target));
    http::write(stream, make_request(target, path, body));
    beast::flat_buffer buffer;
    http::read(stream, buffer, response);
  } catch (const boost::system::system_error& e) {
    throw std::runtime_error(fmt::format("{}:{}: {}", target.host, target.port, e.code().message()));
  }
  Json json = Json::parse(response.body(), nullptr, false);
  if (response.result_int() != 200 || json.is_discarded()) {
    throw std::runtime_error(
        fmt::format("{} answers {}: {}", path, response.result_int(), message_of(response.body())));
  }
  return json;
}

}  // namespace flash_mla::bench
