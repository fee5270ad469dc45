#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>  // Boost 1.74's asio/awaitable.hpp uses it without including it
#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla::server {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 8000;  ///< 0: any free one
  std::string model_name;
  std::vector<std::string> api_keys;  ///< empty: everybody may call
  std::size_t max_body_bytes = std::size_t{8} << 20;
  int max_connections = 2048;
  int read_timeout_seconds = 30;   ///< for a whole request once it has begun
  int write_timeout_seconds = 30;  ///< for a client that does not read
  int idle_timeout_seconds = 120;  ///< between requests of a connection
  int num_threads = 2;
};

/// OpenAI-compatible HTTP over an engine that runs in its own thread; the engine never waits for a socket. A
/// client that goes away has its requests cancelled.
class Server {
 public:
  /// Binds. Throws std::runtime_error if that fails. `engine` must outlive the server and have been started.
  Server(Engine& engine, const ServerOptions& options);
  ~Server();

  int port() const;
  /// Serves until SIGINT or SIGTERM, then refuses new work and finishes what runs; a second signal stops at
  /// once.
  void run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The engine's figures as Prometheus text exposition, format 0.0.4.
std::string prometheus_text(const EngineStats& stats);

}  // namespace flash_mla::server
