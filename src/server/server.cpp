#include "server/server.h"

#include <fmt/format.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <cstdlib>
#include <thread>

#include "flash_mla/error.h"
#include "server/chat_prompt.h"
#include "server/connection.h"
#include "server/http_types.h"
#include "server/origin.h"
#include "server/shared.h"

namespace flash_mla::server {
namespace {

void check_names(const ServerOptions& options) {
  check_reasoning_parser(options.reasoning_parser);
  if (options.model_names.empty()) throw InvalidArgument("model_names is empty, expected a name");
  for (const std::string& name : options.model_names) {
    if (name.empty()) throw InvalidArgument("--served-model-name is empty, expected a name");
  }
  for (const std::string& key : options.api_keys) {
    if (key.empty()) throw InvalidArgument("--api-key is empty, expected a key");
  }
  for (const std::string& host : options.allowed_hosts) check_allowed_host(host);
  for (const std::string& origin : options.cors_origins) check_cors_origin(origin);
}

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

// Time for the log's last lines; then the process is over, even if some thread cannot be interrupted.
void end_process_soon() {
  std::thread([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    std::_Exit(0);
  }).detach();
}

}  // namespace

void Shared::note(const RequestRecord& record) {
  {
    const std::lock_guard lock(mutex_);
    ++responses_[record.status];
  }
  // One call, so that lines of several threads do not mix.
  if (!options.log_requests) return;
  const std::string line = log_line(record);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

HttpStats Shared::http_stats() {
  const std::lock_guard lock(mutex_);
  return {options.version, model_name(), responses_, num_connections};
}

bool is_public(const ServerOptions& options) {
  error_code error;
  const auto address = asio::ip::make_address(options.host, error);
  return error || !address.is_loopback();
}

void check_options(const ServerOptions& options) {
  check_names(options);
  asio::io_context context;
  tcp::acceptor acceptor(context);
  bind_to_address(acceptor, options);
}

struct Server::Impl {
  Impl(Engine& engine, const ServerOptions& options)
      : shared(engine, options), control(asio::make_strand(context)), acceptor(control) {
    check_names(options);
    bind_to_address(acceptor, options);
    acceptor.listen(asio::socket_base::max_listen_connections);
  }
  ~Impl() {
    shared.body_threads.reset();
    signal_context.stop();
  }

  awaitable<void> accept();
  awaitable<void> drain();
  awaitable<void> wait_for_signals();

  // Signals have a thread of their own: they are heard whatever the others do.
  asio::io_context signal_context;
  asio::signal_set signals{signal_context, SIGINT, SIGTERM};
  std::jthread signal_thread;

  Shared shared;
  // After all that connections use: a second signal leaves them to this one's destructor.
  asio::io_context context;
  // Accepting and draining, one at a time: they share the acceptor.
  asio::strand<asio::io_context::executor_type> control;
  tcp::acceptor acceptor;
};

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
    asio::co_spawn(executor, serve_connection(shared, beast::tcp_stream(std::move(socket))), asio::detached);
  }
}

/// Takes no more connections, and ends when the last call has.
awaitable<void> Server::Impl::drain() {
  error_code ignored;
  acceptor.close(ignored);
  asio::steady_timer pause(control);
  while (shared.num_calls > 0) {
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
  if (error) co_return;
  shared.draining = true;
  fmt::print(stderr, "flash-mla serve: finishing {} requests; a second signal stops at once\n",
             shared.num_calls.load());
  // Whichever comes first: the last call ends, or the second signal.
  asio::co_spawn(control, drain(), asio::detached);
  co_await signals.async_wait(redirect_error(use_awaitable, error));
  if (error) co_return;
  end_process_soon();
  context.stop();
}

Server::Server(Engine& engine, const ServerOptions& options)
    : impl_(std::make_unique<Impl>(engine, options)) {}
Server::~Server() = default;

int Server::port() const { return impl_->acceptor.local_endpoint().port(); }

void Server::run() {
  asio::co_spawn(impl_->control, impl_->accept(), asio::detached);
  asio::co_spawn(impl_->signal_context, impl_->wait_for_signals(), asio::detached);
  impl_->signal_thread = std::jthread([this] { impl_->signal_context.run(); });
  std::vector<std::jthread> threads;
  for (int i = 1; i < impl_->shared.options.num_threads; ++i) {
    threads.emplace_back([this] { impl_->context.run(); });
  }
  impl_->context.run();
}

}  // namespace flash_mla::server
