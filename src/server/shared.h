#pragma once

#include <atomic>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "flash_mla/engine.h"
#include "server/limits.h"
#include "server/request_log.h"
#include "server/response_store.h"
#include "server/server.h"

namespace flash_mla::server {

/// What all connections of a server share.
struct Shared {
  Shared(Engine& served, const ServerOptions& o) : engine(served), options(o), loopback(!is_public(o)) {}

  /// Counts a request and logs it.
  void note(const RequestRecord& record);
  HttpStats http_stats();
  const std::string& model_name() const { return options.model_names.front(); }

  Engine& engine;
  const ServerOptions options;
  const bool loopback;  ///< nobody but this machine can call
  const std::int64_t created =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  std::atomic<int> num_connections = 0;
  std::atomic<int> num_calls = 0;  ///< from their heads on; a drained server still finishes them
  std::atomic<bool> draining = false;
  std::atomic<std::uint64_t> next_call = 1;
  ResponseStore responses;
  /// Parse and tokenize large bodies; see kMaxInlineBodyBytes. What waits for them belongs to connections: to
  /// be ended before those.
  std::unique_ptr<boost::asio::thread_pool> body_threads =
      std::make_unique<boost::asio::thread_pool>(kBodyThreads);

 private:
  std::mutex mutex_;
  std::map<int, std::int64_t> responses_;  // by status
};

/// Counts something for as long as it lives.
class Counted {
 public:
  explicit Counted(std::atomic<int>& count) : count_(count) { ++count_; }
  ~Counted() { --count_; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::atomic<int>& count_;
};

/// Counts and logs a request, however its answer ended.
class Noted {
 public:
  Noted(Shared& shared, const RequestRecord& record) : shared_(shared), record_(record) {}
  ~Noted() { shared_.note(record_); }
  Noted(const Noted&) = delete;
  Noted& operator=(const Noted&) = delete;

 private:
  Shared& shared_;
  const RequestRecord& record_;
};

}  // namespace flash_mla::server
