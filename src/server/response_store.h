#pragma once

#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "server/limits.h"

namespace flash_mla::server {

/// The conversations of /v1/responses, for previous_response_id: in memory, the latest kMaxStoredResponses of
/// them that fit into kMaxStoredBytes. From any thread.
class ResponseStore {
 public:
  /// Keeps messages, as JSON, under a response's id. More than kMaxStoredBytes are not kept.
  void put(const std::string& id, std::string messages);
  /// Empty if there is none, or it had to make room.
  std::optional<std::string> get(const std::string& id);

 private:
  struct Entry {
    std::string id, messages;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;  // the latest used first
  std::unordered_map<std::string, std::list<Entry>::iterator> by_id_;
  std::size_t bytes_ = 0;
};

}  // namespace flash_mla::server
