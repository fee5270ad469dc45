#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/peer_loader.h"
#include "engine/peer_ticket.h"
#include "engine/request.h"

namespace flash_mla::engine {

/// What both sides of prefill and decode have: tickets of the sequences that have a room, and figures.
class PeerSide : public PeerLoader {
 public:
  void hurry() override {}

 protected:
  void admit(Sequence& sequence, std::shared_ptr<PeerTicket> ticket) {
    std::erase_if(tickets_, [](const auto& t) { return t.expired(); });
    tickets_.push_back(ticket);
    sequence.peer_ticket = std::move(ticket);
    ++open_;
  }
  /// f(ticket) of all that are left.
  template <class F>
  void for_tickets(const F& f) {
    for (const auto& weak : tickets_) {
      if (const auto ticket = weak.lock()) f(*ticket);
    }
  }

  // Figures, from any thread.
  void count(const std::function<void(TransferStats&)>& change) {
    const std::lock_guard lock(mutex_);
    change(stats_);
  }
  void fall_back(const std::string& why, const std::string& reason = {}) {
    const std::lock_guard lock(mutex_);
    ++fallbacks_[why];
    if (!reason.empty()) stats_.last_trouble = reason;
  }
  TransferStats figures(TransferRole role) const {
    const std::lock_guard lock(mutex_);
    TransferStats out = stats_;
    out.role = role;
    out.open = open_;
    out.fallbacks.assign(fallbacks_.begin(), fallbacks_.end());
    return out;
  }

  std::atomic<int> open_ = 0;  ///< tickets that a sequence has

 private:
  std::vector<std::weak_ptr<PeerTicket>> tickets_;
  mutable std::mutex mutex_;  // of what follows
  TransferStats stats_;
  std::map<std::string, std::int64_t> fallbacks_;
};

}  // namespace flash_mla::engine
