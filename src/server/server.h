#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
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
  /// From a request's arrival to the end of its answer; what is not done then is cancelled. 0: no limit.
  double request_timeout_seconds = 600;
  bool log_requests = true;  ///< a line of JSON to stderr for each
  int num_threads = 2;
};

/// Throws as Server does if host and port cannot be bound: worth knowing before a model is loaded.
void check_address(const ServerOptions& options);

/// OpenAI-compatible HTTP over an engine that runs in its own thread; the engine never waits for a socket. A
/// client that goes away has its requests cancelled.
class Server {
 public:
  /// Binds. Throws InvalidArgument for a host that is no address, std::runtime_error if it cannot be bound.
  /// `engine` must outlive the server; it runs in its own thread when run() is called.
  Server(Engine& engine, const ServerOptions& options);
  ~Server();

  int port() const;
  /// Serves until SIGINT or SIGTERM, then refuses new work and finishes what runs. A second signal ends the
  /// process (with code 0) within half a second, whatever runs.
  void run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The server's own figures.
struct HttpStats {
  std::map<int, std::int64_t> responses;  ///< by status; 499: the client left before its answer ended
  int connections = 0;                    ///< open now
};

/// The figures of engine and server as Prometheus text exposition, format 0.0.4.
std::string prometheus_text(const EngineStats& stats, const HttpStats& http);

}  // namespace flash_mla::server
