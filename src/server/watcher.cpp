#include "server/watcher.h"

#include <poll.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <utility>

namespace flash_mla::server {
namespace {

awaitable<void> watch(beast::tcp_stream& stream, std::shared_ptr<Mailbox> mailbox) {
  char byte = 0;
  error_code error;
  co_await stream.socket().async_receive(asio::buffer(&byte, 1), asio::socket_base::message_peek,
                                         redirect_error(use_awaitable, error));
  // Behind the next request, sent early, an end of input cannot be waited for.
  asio::steady_timer timer(co_await asio::this_coro::executor);
  while (!error && !mailbox->closed() && !has_hung_up(stream.socket().native_handle())) {
    timer.expires_after(std::chrono::milliseconds(100));
    co_await timer.async_wait(redirect_error(use_awaitable, error));
  }
  if (!mailbox->closed()) mailbox->client_left();
}

}  // namespace

bool has_hung_up(tcp::socket::native_handle_type socket) {
  pollfd wanted{socket, POLLRDHUP, 0};
  return ::poll(&wanted, 1, 0) != 0;
}

Watcher::Watcher(beast::tcp_stream& stream, std::shared_ptr<Mailbox> mailbox)
    : stream_(stream), mailbox_(std::move(mailbox)) {
  asio::co_spawn(stream.get_executor(), watch(stream, mailbox_), asio::detached);
}

Watcher::~Watcher() {
  mailbox_->close();
  error_code ignored;
  stream_.socket().cancel(ignored);
}

}  // namespace flash_mla::server
