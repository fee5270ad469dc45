#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "transfer/identity.h"

// The decode side of a bootstrap room; page_sender.h has the messages.

namespace flash_mla::transfer {

/// Why a room's pages have not come.
enum class Trouble { kNone, kRefused, kLate, kGone, kMemory, kChanged, kGivenUp };
/// "none"; "refused": the two sides' pages differ, or the key; "late": the lease is over; "gone": the prefill server
/// cannot be reached or is no more; "memory": there is no room for what would come; "changed": the bytes are not those
/// that were sent; "given_up": by the prefill server.
const char* trouble_name(Trouble trouble);

/// A room on the decode side.
class IncomingRoom {
 public:
  /// Whether all pages have come, or never will.
  bool settled() const { return state_ != State::kWaiting; }
  bool arrived() const { return state_ == State::kArrived; }
  /// Of one that is settled and has not arrived.
  Trouble trouble() const;
  std::string reason() const;
  /// Copies what has come, laid out as PageLayout of its pages, and compares the checksums: false, and the room has
  /// trouble, where they differ. Once; the landing is free then.
  bool take(std::span<std::byte> to);
  /// From asking to the arrival.
  double seconds() const { return seconds_; }
  std::size_t bytes() const { return layout_.bytes(); }
  std::int64_t num_pages() const { return layout_.num_pages(); }

 private:
  friend class PageReceiver;
  enum class State { kWaiting, kArrived, kFailed };
  struct Written {
    int layer = 0;
    std::int64_t page = 0, count = 0;
    std::uint64_t checksum = 0;
  };

  void note_written(const Json& message);
  void note_done();
  void fail(Trouble trouble, const std::string& reason);

  std::pair<std::string, int> link_;  // host and port
  std::int64_t room_ = 0, num_tokens_ = 0;
  std::string digest_;
  PageLayout layout_;
  Clock::time_point begin_{}, end_{};
  std::unique_ptr<Landing> landing_;
  std::atomic<bool> dropped_ = false;  // nobody waits for it any more
  Clock::time_point dropped_at_{};
  std::atomic<State> state_ = State::kWaiting;
  double seconds_ = 0;

  mutable std::mutex mutex_;  // of what follows
  Trouble trouble_ = Trouble::kNone;
  std::string reason_;
  std::vector<Written> written_;
  std::vector<bool> covered_;  // (layers, pages)
};

/// Asks prefill servers for the pages of rooms.
class PageReceiver {
 public:
  struct Options {
    Identity identity;
    std::string key;
    std::vector<std::string> peers;  ///< "HOST:PORT" of prefill servers that may be asked; "*": any
    double lease_seconds = 30;
    std::function<void()> on_news;  ///< settled() of a room may have changed. From any thread
  };
  PageReceiver(PageTransport& transport, Options options);
  ~PageReceiver();

  /// Begins to ask; waits for nothing. `with_pages` false: only tells the prefill server that none are wanted. Throws
  /// InvalidArgument for a server that is none of the peers.
  std::shared_ptr<IncomingRoom> ask(const std::string& host, int port, std::int64_t room,
                                    std::span<const std::int32_t> tokens, bool with_pages);
  /// Nobody waits for it any more.
  void drop(const std::shared_ptr<IncomingRoom>& room);
  /// Gives rooms up whose lease is over, and has those asked for that wait for memory, where some has become free. Now and
  /// then.
  void poll();
  /// Throws InvalidArgument for a server that is none of the peers, and for ports out of range.
  void check_peer(const std::string& host, int port) const;
  /// Landings that are in use.
  std::size_t num_landings() const { return num_landings_; }

 private:
  class Link;
  /// What links share with this object.
  std::unique_ptr<Landing> land(std::size_t bytes);
  void note_freed();
  Link& link_to(const std::string& host, int port);

  PageTransport& transport_;
  const Options options_;
  std::atomic<std::size_t> num_landings_ = 0;
  std::atomic<std::size_t> num_freed_ = 0;  // landings so far
  std::atomic<bool> freed_ = false;         // a landing, since poll() was last called
  std::mutex mutex_;                        // of what follows
  std::map<std::pair<std::string, int>, std::unique_ptr<Link>> links_;
};

}  // namespace flash_mla::transfer
