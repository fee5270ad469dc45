#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "transfer/identity.h"

// The prefill side of a bootstrap room. A router gives a request to a prefill and to a decode server with the same
// bootstrap_room; the decode server connects here and asks for the room's pages, and they are pushed to its landing.
// Messages, each with its "kind":
//
//   decode to prefill   hello {key, identity, transport, description}      ask {room, digest, tokens, pages, landing}
//                       drop {room}: nobody waits for it any more
//   prefill to decode   welcome, or refused {reason}
//                       wrote {room, layer, page, count, checksum}          layer -1: all
//                       done {room}: all is written    failed {room, reason}: no more will be
//
// A lease is how long either side waits for the other. Whatever goes wrong with a room, the decode side computes the
// prompt itself.

namespace flash_mla::transfer {

class PageSender;

/// A room on the prefill side. Belongs to the engine, and does not outlive the sender; write, finish and fail may be called
/// from any one thread at a time.
class OutgoingRoom {
 public:
  ~OutgoingRoom();
  OutgoingRoom(const OutgoingRoom&) = delete;
  OutgoingRoom& operator=(const OutgoingRoom&) = delete;

  /// Whether the decode side has asked, so that it is known what to do; or whether it has given up.
  bool asked() const { return asked_; }
  /// Whether pages are to be sent: it has asked for them and waits.
  bool wanted() const { return asked_ && !over_ && layout_.num_pages() > 0; }
  bool over() const { return over_; }
  bool late() const { return !asked_ && Clock::now() > deadline_; }
  /// Of whom the pages are for, to tell connections apart. Once it has asked.
  std::uint64_t peer() const { return peer_; }

  /// Sends pages [page, page + count) of a layer, or of all (-1), which lie as (layers, count, bytes in the layer).
  /// Returns when they have arrived, or the room is over: whatever goes wrong ends it. The bytes that went.
  std::size_t write(int layer, std::int64_t page, std::int64_t count, const std::byte* bytes);
  /// All has been written.
  void finish();
  /// Nothing more will be. Without effect on a room that is over.
  void fail(const std::string& reason);

 private:
  friend class PageSender;
  struct Link;
  OutgoingRoom(PageSender& sender, std::int64_t room, std::string digest, std::int64_t num_tokens,
               Clock::time_point deadline);

  PageSender& sender_;
  const std::int64_t room_;
  const std::string digest_;
  const std::int64_t num_tokens_;
  const Clock::time_point deadline_;  // for the decode side to ask
  std::shared_ptr<Link> link_;        // from here on once asked_
  std::unique_ptr<Target> target_;
  PageLayout layout_;
  std::uint64_t peer_ = 0;
  Clock::time_point end_{};  // of the lease
  std::atomic<bool> asked_ = false, over_ = false;
};

/// Where decode servers connect to, and which rooms they have asked for.
class PageSender {
 public:
  struct Options {
    Identity identity;
    std::string host;
    int port = 0;     ///< 0: any free one
    std::string key;  ///< that peers must know; empty: none
    double lease_seconds = 30;
    std::function<void()>
        on_news;  ///< asked(), wanted() or late() of a room may have changed. From any thread
  };
  /// Throws as Listener does. `transport` outlives it.
  PageSender(PageTransport& transport, Options options);
  ~PageSender();

  int port() const { return listener_.port(); }
  /// The room of a request with a prompt of this digest and length. Throws InvalidArgument for a room that another has.
  std::shared_ptr<OutgoingRoom> expect(std::int64_t room, std::string digest, std::int64_t num_tokens);
  /// Rooms that somebody has asked for and no request has come for, and rooms of requests.
  std::size_t num_rooms() const;

 private:
  friend class OutgoingRoom;
  using Link = OutgoingRoom::Link;
  struct Ask {
    std::shared_ptr<Link> link;
    std::string digest, landing;
    std::int64_t num_tokens = 0, num_pages = 0;
    Clock::time_point end{};
  };
  struct Entry {
    std::weak_ptr<OutgoingRoom> expected;
    std::optional<Ask> ask;
  };

  void accept();
  void serve(const std::shared_ptr<Link>& link);
  void welcome(Link& link);
  void take(const std::shared_ptr<Link>& link, const Json& message);
  void take_ask(const std::shared_ptr<Link>& link, std::int64_t room, const Json& message);
  void match(OutgoingRoom& room, const Ask& ask);
  void forget(const Link& link);
  void sweep();
  void leave(const OutgoingRoom& room);

  PageTransport& transport_;
  const Options options_;
  Listener listener_;
  mutable std::mutex mutex_;  // of what follows
  std::map<std::int64_t, Entry> rooms_;
  std::list<std::pair<std::shared_ptr<Link>, std::jthread>> links_;
  std::uint64_t next_peer_ = 1;
  bool ending_ = false;

  std::jthread acceptor_;  // last: it uses the others
};

}  // namespace flash_mla::transfer
