#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "engine/peer_hub.h"
#include "engine/peer_loader.h"
#include "engine/peer_ticket.h"
#include "engine/request.h"

namespace flash_mla::engine {

/// What both sides of prefill and decode have: the hub, and tickets of the sequences that have a room.
class PeerSide : public PeerLoader {
 public:
  void hurry() override {}
  void add_to(EngineStats& stats) const override { stats.transfer = hub_->figures(); }

 protected:
  explicit PeerSide(std::shared_ptr<PeerHub> hub) : hub_(std::move(hub)) {}

  PeerHub& hub() const { return *hub_; }
  void admit(Sequence& sequence, std::shared_ptr<PeerTicket> ticket) {
    std::erase_if(tickets_, [](const auto& t) { return t.expired(); });
    tickets_.push_back(ticket);
    sequence.peer_ticket = std::move(ticket);
    ++hub_->open;
  }
  /// f(ticket) of all that are left.
  template <class F>
  void for_tickets(const F& f) {
    for (const auto& weak : tickets_) {
      if (const auto ticket = weak.lock()) f(*ticket);
    }
  }

 private:
  const std::shared_ptr<PeerHub> hub_;
  std::vector<std::weak_ptr<PeerTicket>> tickets_;
};

}  // namespace flash_mla::engine
