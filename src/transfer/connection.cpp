#include "transfer/connection.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <memory>
#include <system_error>
#include <utility>

#include "flash_mla/error.h"

namespace flash_mla::transfer {
namespace {

constexpr auto kSendPatience = std::chrono::seconds(5);
// How long a message may take once it has begun.
constexpr auto kMessagePatience = std::chrono::seconds(10);

std::string reason(int error) { return std::generic_category().message(error); }

/// Whether the socket is ready in time.
bool wait_for(int fd, short events, Clock::time_point deadline) {
  for (;;) {
    int milliseconds = -1;
    if (deadline != Clock::time_point::max()) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
      milliseconds = static_cast<int>(std::clamp<std::int64_t>(left, 0, 1'000'000));
    }
    pollfd waited{fd, events, 0};
    const int n = ::poll(&waited, 1, milliseconds);
    if (n > 0) return true;
    if (n == 0 && milliseconds >= 0 && Clock::now() >= deadline) return false;
    if (n < 0 && errno != EINTR) throw TransferError("the connection has failed: " + reason(errno));
  }
}

void be_prompt(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  // A host that has vanished is noticed within half a minute.
  const int idle = 10, interval = 5, probes = 4;
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
}

using Addresses = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

/// -1 with errno if it does not work in time.
int connect_to(const addrinfo& address, Clock::time_point deadline) {
  const int fd = ::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  int error = ::connect(fd, address.ai_addr, address.ai_addrlen) == 0 ? 0 : errno;
  if (error == EINPROGRESS) {
    socklen_t size = sizeof(error);
    if (!wait_for(fd, POLLOUT, deadline)) {
      error = ETIMEDOUT;
    } else if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
      error = errno;
    }
  }
  if (error == 0) return fd;
  ::close(fd);
  errno = error;
  return -1;
}

}  // namespace

Connection Connection::connect(const std::string& host, int port, Clock::duration patience) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found); error != 0)
    throw TransferError(fmt::format("{} is not known: {}", host, ::gai_strerror(error)));
  const Addresses addresses(found, ::freeaddrinfo);
  const Clock::time_point deadline = Clock::now() + patience;
  int error = 0;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    const int fd = connect_to(*a, deadline);
    if (fd >= 0) return Connection(fd);
    error = errno;
  }
  throw TransferError(fmt::format("{}:{} cannot be reached: {}", host, port, reason(error)));
}

Connection::Connection(int fd) : fd_(fd) { be_prompt(fd); }
Connection::Connection(Connection&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
Connection::~Connection() {
  if (fd_ >= 0) ::close(fd_);
}

void Connection::close() { ::shutdown(fd_, SHUT_RDWR); }

void Connection::send(const Json& message) {
  const std::string text = message.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMaxMessageBytes)
    throw TransferError(
        fmt::format("a message has {} bytes, expected at most {}", text.size(), kMaxMessageBytes));
  const std::uint32_t size = htonl(static_cast<std::uint32_t>(text.size()));
  std::string bytes(reinterpret_cast<const char*>(&size), sizeof(size));
  bytes += text;
  const std::lock_guard lock(sending_);
  send_bytes(bytes.data(), bytes.size());
}

void Connection::send_bytes(const char* data, std::size_t bytes) {
  const Clock::time_point deadline = Clock::now() + kSendPatience;
  while (bytes > 0) {
    const ssize_t n = ::send(fd_, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      data += n;
      bytes -= static_cast<std::size_t>(n);
    } else if (n < 0 && errno != EINTR && errno != EAGAIN) {
      throw TransferError("the peer is gone: " + reason(errno));
    } else if (!wait_for(fd_, POLLOUT, deadline)) {
      close();  // half a message may have gone
      throw TransferError("the peer takes no messages");
    }
  }
}

bool Connection::receive_bytes(char* data, std::size_t bytes, Clock::time_point deadline) {
  while (bytes > 0) {
    if (!wait_for(fd_, POLLIN, deadline)) return false;
    const ssize_t n = ::recv(fd_, data, bytes, MSG_DONTWAIT);
    if (n == 0) throw TransferError("the peer has closed the connection");
    if (n < 0 && errno != EINTR && errno != EAGAIN) throw TransferError("the peer is gone: " + reason(errno));
    if (n <= 0) continue;
    data += n;
    bytes -= static_cast<std::size_t>(n);
  }
  return true;
}

std::optional<Json> Connection::receive(Clock::time_point deadline) {
  if (!wait_for(fd_, POLLIN, deadline)) return std::nullopt;
  const Clock::time_point end = Clock::now() + kMessagePatience;
  std::uint32_t size = 0;
  std::string text;
  bool whole = receive_bytes(reinterpret_cast<char*>(&size), sizeof(size), end);
  size = ntohl(size);
  if (whole && size > kMaxMessageBytes)
    throw TransferError(fmt::format("a message has {} bytes, expected at most {}", size, kMaxMessageBytes));
  if (whole) {
    text.resize(size);
    whole = receive_bytes(text.data(), size, end);
  }
  if (!whole) throw TransferError("the peer has stopped within a message");
  Json message = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!message.is_object()) throw TransferError("the peer has said what is no JSON object");
  return message;
}

Listener::Listener(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICHOST;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0)
    throw InvalidArgument(fmt::format("bootstrap_host is \"{}\", expected an IP address", host));
  const Addresses addresses(found, ::freeaddrinfo);
  fd_ = ::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  ::setsockopt(fd_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (fd_ < 0 || ::bind(fd_, found->ai_addr, found->ai_addrlen) != 0 || ::listen(fd_, 64) != 0) {
    const int error = errno;
    if (fd_ >= 0) ::close(fd_);
    throw TransferError(fmt::format("{}:{} cannot be bound: {}", host, port, reason(error)));
  }
  sockaddr_storage bound{};
  socklen_t size = sizeof(bound);
  ::getsockname(fd_, reinterpret_cast<sockaddr*>(&bound), &size);
  port_ = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                                            : reinterpret_cast<sockaddr_in&>(bound).sin_port);
}

Listener::~Listener() { ::close(fd_); }

void Listener::close() {
  closed_ = true;
  ::shutdown(fd_, SHUT_RDWR);  // wakes accept()
}

std::optional<Connection> Listener::accept() {
  while (!closed_) {
    const int fd = ::accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) return Connection(fd);
    if (closed_) break;
    // Out of files, most likely: give others time to close.
    if (errno != EINTR && errno != ECONNABORTED) ::poll(nullptr, 0, 50);
  }
  return std::nullopt;
}

std::int64_t integer_of(const Json& message, const char* name) {
  const auto it = message.find(name);
  if (it == message.end() || !it->is_number_integer() ||
      (it->is_number_unsigned() && it->get<std::uint64_t>() > std::uint64_t{INT64_MAX}))
    throw TransferError(fmt::format("the peer's message has no integer {}", name));
  return it->get<std::int64_t>();
}

std::string text_of(const Json& message, const char* name) {
  const auto it = message.find(name);
  if (it == message.end() || !it->is_string())
    throw TransferError(fmt::format("the peer's message has no text {}", name));
  return it->get<std::string>();
}

std::string to_hex(const std::string& bytes) {
  constexpr std::array kDigits = {'0', '1', '2', '3', '4', '5', '6', '7',
                                  '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'};
  std::string out;
  out.reserve(2 * bytes.size());
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    out += kDigits.at(byte >> 4);
    out += kDigits.at(byte & 15);
  }
  return out;
}

std::string from_hex(const std::string& digits) {
  const auto value = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    throw TransferError("the peer has said what are no hexadecimal digits");
  };
  if (digits.size() % 2 != 0) throw TransferError("the peer has said half a byte");
  std::string out;
  for (std::size_t i = 0; i < digits.size(); i += 2)
    out += static_cast<char>(value(digits[i]) * 16 + value(digits[i + 1]));
  return out;
}

}  // namespace flash_mla::transfer
