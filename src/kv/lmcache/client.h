#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "kv/lmcache/shared_pool.h"

namespace flash_mla::kv {

/// The name of a model at the server, and what a chunk is there: (layers, kChunkTokens, width) of a torch dtype.
struct LmCacheLayout {
  std::string model;
  std::int64_t layers = 1, width = 0;
  std::string dtype;
};

/// What LMCache's multi-process server, 0.5.6, is asked, over gRPC: names, field numbers and the order of the calls are its
/// own (lmcache.proto). From any thread; every call waits for its answer, for two seconds at most, and throws
/// std::runtime_error if it fails. The engine introduces itself before the first call and again after one that has failed:
/// the server may be another one by then. It is not asked for a second after a failure.
///
/// `request` names a session at the server: a look-up with its loads, or a store. Tokens are those of a prompt from its
/// first on; chunks are counted from 0.
class LmCacheClient {
 public:
  /// `address`: HOST:PORT. Nothing is asked yet.
  LmCacheClient(const std::string& address, LmCacheLayout layout);
  /// Takes leave of the server, where it was known there.
  ~LmCacheClient();
  LmCacheClient(const LmCacheClient&) = delete;
  LmCacheClient& operator=(const LmCacheClient&) = delete;

  /// The pool of the server as it is now.
  std::shared_ptr<SharedPool> pool();
  /// A name that no other session has.
  std::string new_request();

  /// Leading chunks of `tokens` that the server has. Those from its stores are brought meanwhile, and all are locked.
  std::int64_t look_up(const std::string& request, std::span<const std::int32_t> tokens);
  /// The slots of chunks [first, last) of `tokens`, whose lock they have; none: they are gone.
  std::vector<std::span<std::byte>> prepare_retrieve(const std::string& request,
                                                     std::span<const std::int32_t> tokens, std::int64_t first,
                                                     std::int64_t last, const SharedPool& pool);
  /// Nobody reads those slots any more.
  void commit_retrieve(const std::string& request, std::span<const std::int32_t> tokens, std::int64_t first,
                       std::int64_t last);
  /// Nobody will read the first `last` chunks that were found.
  void free_locks(const std::string& request, std::span<const std::int32_t> tokens, std::int64_t last);
  void end_session(const std::string& request);

  /// The slot for the last chunk of `tokens`; none: the server has it already, or no room.
  std::vector<std::span<std::byte>> prepare_store(const std::string& request,
                                                  std::span<const std::int32_t> tokens,
                                                  const SharedPool& pool);
  /// Its bytes are there.
  bool commit_store(const std::string& request, std::span<const std::int32_t> tokens);

 private:
  struct Stubs;
  template <class Stub, class Method, class Request, class Answer>
  void call(Stub& stub, Method method, const Request& request, Answer& answer,
            std::chrono::milliseconds limit);
  void failed();

  const LmCacheLayout layout_;
  const std::int64_t instance_;
  std::unique_ptr<Stubs> stubs_;
  std::mutex mutex_;  // of what follows
  std::int64_t num_requests_ = 0;
  std::shared_ptr<SharedPool> pool_;  // null: the server does not know this engine
  std::chrono::steady_clock::time_point pause_end_{};
};

}  // namespace flash_mla::kv
