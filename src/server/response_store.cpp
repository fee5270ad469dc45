#include "server/response_store.h"

#include <utility>

namespace flash_mla::server {

void ResponseStore::put(const std::string& id, std::string messages) {
  if (messages.size() > kMaxStoredBytes) return;
  const std::lock_guard lock(mutex_);
  bytes_ += messages.size();
  entries_.push_front({id, std::move(messages)});
  by_id_[id] = entries_.begin();
  while (bytes_ > kMaxStoredBytes || entries_.size() > kMaxStoredResponses) {
    bytes_ -= entries_.back().messages.size();
    by_id_.erase(entries_.back().id);
    entries_.pop_back();
  }
}

std::optional<std::string> ResponseStore::get(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) return {};
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->messages;
}

}  // namespace flash_mla::server
