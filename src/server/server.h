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
  int port = 8000;      ///< 0: any free one
  std::string version;  ///< of the program, for who asks
  /// The model goes by any of them; answers say the first. At least one.
  std::vector<std::string> model_names;
  std::vector<std::string> api_keys;       ///< empty: everybody may call
  std::vector<std::string> allowed_hosts;  ///< names in Host; see is_allowed_host (server/origin.h)
  std::vector<std::string> cors_origins;   ///< whose pages may call; empty: none, "*": any
  std::size_t max_body_bytes = std::size_t{8} << 20;
  int max_connections = 2048;
  int read_timeout_seconds = 30;   ///< for a whole request once it has begun
  int write_timeout_seconds = 30;  ///< for a client that does not read
  int idle_timeout_seconds = 120;  ///< between requests of a connection
  /// After that long without news a stream gets a comment, lest something in between close it. 0: never.
  int stream_keep_alive_seconds = 15;
  /// From a request's arrival to the end of its answer; what is not done then is cancelled. 0: no limit.
  double request_timeout_seconds = 600;
  /// How the reasoning of answers is found: "auto" (by the model's tokens and the prompt), "none", or a name of
  /// vLLM's (see check_reasoning_parser).
  std::string reasoning_parser = "auto";
  bool log_requests = true;  ///< a line of JSON to stderr for each
  int num_threads = 2;
};

/// Throws as Server does for options that are wrong and if host and port cannot be bound: worth knowing before
/// a model is loaded.
void check_options(const ServerOptions& options);

/// Whether other machines can reach a server with this address.
bool is_public(const ServerOptions& options);

/// OpenAI-compatible HTTP over an engine that runs in its own thread; the engine never waits for a socket. A
/// client that goes away has its requests cancelled.
class Server {
 public:
  /// Binds. Throws InvalidArgument for a host that is no address and for names and origins that no request
  /// could have, std::runtime_error if the address cannot be bound.
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
  std::string version, model;             ///< of the program; the first of its names
  std::map<int, std::int64_t> responses;  ///< by status; 499: the client left before its answer ended
  int connections = 0;                    ///< open now
};

/// The figures of engine and server as Prometheus text exposition, format 0.0.4.
std::string prometheus_text(const EngineStats& stats, const HttpStats& http);

}  // namespace flash_mla::server
