#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "flash_mla/engine.h"
#include "transfer/page_receiver.h"
#include "transfer/page_sender.h"
#include "transfer/page_transport.h"

namespace flash_mla::engine {

/// What an engine is met by, whatever its ranks are: one address, or one way to prefill servers, one memory for what
/// comes, and figures of all. From any thread.
class PeerHub {
 public:
  /// Throws InvalidArgument, Unsupported, or transfer::TransferError where the address cannot be bound. `on_news`: of
  /// the sender or the receiver.
  PeerHub(const TransferOptions& options, transfer::Identity identity, std::function<void()> on_news);

  transfer::PageSender& sender() const { return *sender_; }        ///< of a prefill server
  transfer::PageReceiver& receiver() const { return *receiver_; }  ///< of a decode server

  void count(const std::function<void(TransferStats&)>& change) {
    const std::lock_guard lock(mutex_);
    change(stats_);
  }
  void fall_back(const std::string& why, const std::string& reason = {}) {
    const std::lock_guard lock(mutex_);
    ++fallbacks_[why];
    if (!reason.empty()) stats_.last_trouble = reason;
  }
  TransferStats figures() const;

  std::atomic<int> open = 0;  ///< tickets that a sequence has

 private:
  const std::unique_ptr<transfer::PageTransport> transport_;
  std::unique_ptr<transfer::PageSender> sender_;
  std::unique_ptr<transfer::PageReceiver> receiver_;
  mutable std::mutex mutex_;  // of what follows
  TransferStats stats_;
  std::map<std::string, std::int64_t> fallbacks_;
};

}  // namespace flash_mla::engine
