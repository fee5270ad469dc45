#pragma once

#include <algorithm>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "flash_mla/engine.h"
#include "server/http_types.h"

namespace flash_mla::server {

/// Events on their way from the engine's thread to a connection's. The engine only appends and rings.
class Mailbox : public std::enable_shared_from_this<Mailbox> {
 public:
  using Events = std::deque<std::pair<int, GenerationEvent>>;  ///< with the choice, over all prompts

  explicit Mailbox(const asio::any_io_executor& executor)
      : executor_(executor), bell_(executor, TimePoint::max()) {}

  /// From any thread.
  void put(int index, const GenerationEvent& event) {
    bool ring = false;
    {
      const std::lock_guard lock(mutex_);
      ring = events_.empty();
      events_.emplace_back(index, event);
    }
    if (ring) asio::post(executor_, [self = shared_from_this()] { self->bell_.cancel(); });
  }

  // On the connection's strand, as everything below.

  /// When take() gives up.
  void set_deadline(TimePoint deadline) { deadline_ = deadline; }
  bool late() const { return std::chrono::steady_clock::now() >= deadline_; }
  void client_left() {
    gone_ = true;
    bell_.cancel();
  }
  bool gone() const { return gone_; }
  /// Nobody takes from here any more.
  void close() { closed_ = true; }
  bool closed() const { return closed_; }

  /// Waits for events; empty if the client went away, the deadline has passed, or nothing came before `until`.
  awaitable<Events> take(TimePoint until) {
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        if (gone_ || late()) co_return Events();
        if (!events_.empty()) co_return std::exchange(events_, {});
      }
      if (std::chrono::steady_clock::now() >= until) co_return Events();
      bell_.expires_at(std::min(deadline_, until));
      error_code rung;
      co_await bell_.async_wait(redirect_error(use_awaitable, rung));
    }
  }

 private:
  asio::any_io_executor executor_;
  asio::steady_timer bell_;
  std::mutex mutex_;
  Events events_;
  bool gone_ = false, closed_ = false;
  TimePoint deadline_ = TimePoint::max();
};

}  // namespace flash_mla::server
