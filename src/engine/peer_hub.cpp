#include "engine/peer_hub.h"

#include <utility>

namespace flash_mla::engine {
namespace {

std::unique_ptr<transfer::PageTransport> make_transport(const TransferOptions& options) {
  return options.transport == "nixl" ? transfer::make_nixl_transport(options.memory_bytes)
                                     : transfer::make_shared_memory_transport(options.memory_bytes);
}

}  // namespace

PeerHub::PeerHub(const TransferOptions& options, transfer::Identity identity, std::function<void()> on_news)
    : transport_(make_transport(options)) {
  stats_.role = options.role;
  if (options.role == TransferRole::kPrefill) {
    sender_ = std::make_unique<transfer::PageSender>(
        *transport_, transfer::PageSender::Options{std::move(identity), options.host, options.port,
                                                   options.key, options.lease_seconds, std::move(on_news)});
    stats_.port = sender_->port();
  } else {
    receiver_ = std::make_unique<transfer::PageReceiver>(
        *transport_, transfer::PageReceiver::Options{std::move(identity), options.key, options.peers,
                                                     options.lease_seconds, std::move(on_news)});
  }
}

TransferStats PeerHub::figures() const {
  const std::lock_guard lock(mutex_);
  TransferStats out = stats_;
  out.open = open;
  out.fallbacks.assign(fallbacks_.begin(), fallbacks_.end());
  return out;
}

}  // namespace flash_mla::engine
