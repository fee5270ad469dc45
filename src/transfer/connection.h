#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "transfer/page_transport.h"

namespace flash_mla::transfer {

using Json = nlohmann::json;

/// The longest message that is taken from a peer.
inline constexpr std::uint32_t kMaxMessageBytes = 1 << 20;

/// JSON messages over TCP, each behind its length in four bytes, the highest first. One thread may receive while others
/// send.
class Connection {
 public:
  /// Throws TransferError if nobody answers in time.
  static Connection connect(const std::string& host, int port, Clock::duration patience);
  /// Takes over a socket.
  explicit Connection(int fd);
  Connection(Connection&& other) noexcept;
  Connection& operator=(Connection&&) = delete;
  ~Connection();

  /// Throws TransferError if the peer is gone, or takes nothing for some seconds.
  void send(const Json& message);
  /// The next message; empty once `deadline` has passed without one. Throws TransferError if the peer is gone, or says
  /// what is no message.
  std::optional<Json> receive(Clock::time_point deadline = Clock::time_point::max());
  /// Whoever sends or receives is told that the peer is gone. From any thread.
  void close();

 private:
  void send_bytes(const char* data, std::size_t bytes);
  bool receive_bytes(char* data, std::size_t bytes, Clock::time_point deadline);

  int fd_;
  std::mutex sending_;
};

/// Where peers connect to.
class Listener {
 public:
  /// Port 0: any free one. Throws InvalidArgument for a host that is no address, TransferError if it cannot be bound.
  Listener(const std::string& host, int port);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int port() const { return port_; }
  /// The next peer; nothing once close() has been called.
  std::optional<Connection> accept();
  void close();

 private:
  int fd_ = -1;
  int port_ = 0;
  std::atomic<bool> closed_ = false;
};

/// Fields of a peer's message. Throw TransferError where they are missing or of another type.
std::int64_t integer_of(const Json& message, const char* name);
std::string text_of(const Json& message, const char* name);

/// Bytes as hexadecimal digits, and back. from_hex throws TransferError.
std::string to_hex(const std::string& bytes);
std::string from_hex(const std::string& digits);

}  // namespace flash_mla::transfer
