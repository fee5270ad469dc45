#pragma once

#include <cstdint>
#include <string>

#include "flash_mla/engine.h"

// `flash-mla loadtest`: a mixed load of short and long prompts on a running server, and how it took it.

namespace flash_mla::bench {

struct LoadTestOptions {
  std::string url = "http://127.0.0.1:8000", api_key;
  std::string model;             ///< name; empty: the server's first
  std::string json_path;         ///< file for the results, or ""
  std::string engine_directory;  ///< a model for an engine of this process; empty: a server
  EngineOptions engine;          ///< of that engine
  int clients = 128, requests = 512;
  double rate = 0;  ///< requests per second; 0: closed loop
  int short_tokens = 1024, long_tokens = 8192, max_tokens = 64;
  double long_share = 0.5, timeout = 600, min_success = 1;
  std::uint64_t seed = 0;
};

/// Returns the process's exit code: 1 if a smaller share of the requests than `min_success` succeeded.
int run_load_test(const LoadTestOptions& options);

}  // namespace flash_mla::bench
