#pragma once

#include <memory>

#include "server/http_types.h"
#include "server/mailbox.h"

namespace flash_mla::server {

/// Whether the other side has closed, though bytes that it sent before still wait to be read. From any thread
/// while the socket stays open.
bool has_hung_up(tcp::socket::native_handle_type socket);

/// Watches, while a call runs, for its client going away.
class Watcher {
 public:
  Watcher(beast::tcp_stream& stream, std::shared_ptr<Mailbox> mailbox);
  /// It must not read beside the next request. What still runs of it touches nothing but its mailbox.
  ~Watcher();
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;

 private:
  beast::tcp_stream& stream_;
  std::shared_ptr<Mailbox> mailbox_;
};

}  // namespace flash_mla::server
