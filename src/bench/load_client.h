#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>  // Boost 1.74's asio/awaitable.hpp uses it without including it
#include <vector>

// Many clients of an OpenAI-compatible server at once, in one thread.

namespace flash_mla::bench {

struct LoadTarget {
  std::string host = "127.0.0.1";
  std::string port = "8000";
  std::string api_key;  ///< empty: none is sent
};

/// "http://HOST[:PORT][/]". Throws InvalidArgument.
LoadTarget parse_target(const std::string& url);

/// One request, and after the run what became of it. Times in seconds.
struct LoadRequest {
  int load_class = 0;                ///< for the caller
  std::vector<std::int32_t> prompt;  ///< tokens
  int max_tokens = 1;                ///< generated, past any end of sentence, always the likeliest one
  double due = 0;                    ///< open loop: when it is sent, from the beginning of the run
  int status = 0;                    ///< HTTP status; 0: the connection failed
  std::string error;                 ///< empty: the whole answer arrived
  double begin = 0;                  ///< open loop: `due`, so that a late client counts against the server
  double first = 0;                  ///< first text, same clock
  double last = 0;                   ///< last text
  double end = 0;                    ///< end of the answer
  std::int64_t prompt_tokens = 0, completion_tokens = 0;
};

struct LoadOptions {
  LoadTarget target;
  std::string model;             ///< name in the requests
  int clients = 128;             ///< closed loop: that many send one request after another
  bool open_loop = false;        ///< each request at its time, however many are open
  double timeout_seconds = 600;  ///< of one request
};

/// Sends all requests and fills in their results. `progress(done)` is called about five times a second.
/// Returns the seconds that it took. Throws std::runtime_error if the server's address cannot be found.
double run_load(const LoadOptions& options, std::vector<LoadRequest>& requests,
                const std::function<void(std::size_t done)>& progress);

/// One call whose JSON answer is returned; GET without a body. Throws std::runtime_error with the server's
/// message if it fails.
nlohmann::json call_server(const LoadTarget& target, const std::string& path, const std::string& body = {});

}  // namespace flash_mla::bench
