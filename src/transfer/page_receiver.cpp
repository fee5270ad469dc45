#include "transfer/page_receiver.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "base/task_thread.h"
#include "flash_mla/error.h"

namespace flash_mla::transfer {
namespace {

constexpr auto kConnectPatience = std::chrono::seconds(2);
constexpr auto kWelcomePatience = std::chrono::seconds(10);
// A server that could not be reached is not tried again for so long: what comes meanwhile need not wait for it.
constexpr auto kPause = std::chrono::seconds(1);
constexpr auto kSweep = std::chrono::milliseconds(250);
// How long a prefill server may take to let go of a room that was dropped. Until then it may write to its landing.
constexpr auto kDropPatience = std::chrono::seconds(10);
constexpr std::size_t kMaxLinks = 256;

/// Counts a landing for as long as it lives.
class CountedLanding : public Landing {
 public:
  CountedLanding(std::unique_ptr<Landing> landing, std::function<void()> on_end)
      : landing_(std::move(landing)), on_end_(std::move(on_end)) {}
  ~CountedLanding() override {
    landing_.reset();
    on_end_();
  }
  CountedLanding(const CountedLanding&) = delete;
  CountedLanding& operator=(const CountedLanding&) = delete;
  const std::string& address() const override { return landing_->address(); }
  void read(std::size_t offset, std::span<std::byte> to) override { landing_->read(offset, to); }

 private:
  std::unique_ptr<Landing> landing_;
  std::function<void()> on_end_;
};

}  // namespace

/// A prefill server. Rooms are asked for by one thread, which connects where it has to; another takes what the server
/// says as long as there is a connection.
class PageReceiver::Link {
 public:
  Link(PageReceiver& receiver, std::string host, int port)
      : receiver_(receiver), host_(std::move(host)), port_(port), asker_("kv-ask") {}
  ~Link() {
    ending_ = true;
    const std::lock_guard lock(mutex_);
    if (connection_) connection_->close();
  }
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  void ask(const std::shared_ptr<IncomingRoom>& room) {
    asker_.post([this, room] { do_ask(room); });
  }

  void drop(const std::shared_ptr<IncomingRoom>& room) {
    asker_.post([this, room] {
      std::shared_ptr<Connection> connection;
      {
        const std::lock_guard lock(mutex_);
        std::erase(waiting_, room);
        const auto it = rooms_.find(room->room_);
        if (it == rooms_.end() || it->second != room) return;
        connection = connection_;
      }
      try {
        if (connection) connection->send({{"kind", "drop"}, {"room", room->room_}});
      } catch (const TransferError&) {
        connection->close();
      }
    });
  }

  /// Those whose lease is over fail.
  void sweep() {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    for (const std::shared_ptr<IncomingRoom>& room : waiting_) {
      if (now > room->end_) room->fail(Trouble::kMemory, "no memory for transfers has become free in time");
    }
    std::erase_if(waiting_, [](const auto& room) { return room->settled() || room->dropped_; });
    for (const auto& [number, room] : rooms_) {
      if (now > room->end_ && !room->settled()) room->fail(Trouble::kLate, "the lease is over");
    }
  }

  void retry() {
    std::deque<std::shared_ptr<IncomingRoom>> rooms;
    {
      const std::lock_guard lock(mutex_);
      rooms.swap(waiting_);
    }
    for (const auto& room : rooms) ask(room);
  }

 private:
  void do_ask(const std::shared_ptr<IncomingRoom>& room) {
    if (room->dropped_ || room->settled()) return;
    try {
      if (Clock::now() > room->end_) {
        room->fail(Trouble::kLate, "the lease is over");
      } else {
        std::shared_ptr<Connection> connection = connected();
        if (land(room)) {
          while (!enter(*connection, room)) connection = connected();
          send_ask(*connection, *room);
        }
      }
    } catch (const Refused& e) {
      give_up(room, Trouble::kRefused, e.what());
    } catch (const Taken& e) {
      give_up(room, Trouble::kGivenUp, e.what());
    } catch (const std::exception& e) {
      give_up(room, Trouble::kGone, e.what());
    }
    if (room->settled()) receiver_.options_.on_news();
  }

  /// The reader frees the landing of a room that it knows: the server may write to it until their connection ends.
  void give_up(const std::shared_ptr<IncomingRoom>& room, Trouble trouble, const std::string& why) {
    room->fail(trouble, why);
    {
      const std::lock_guard lock(mutex_);
      const auto it = rooms_.find(room->room_);
      if (it != rooms_.end() && it->second == room) return;
    }
    free_landing(*room);
  }

  // Not for a room that waits for memory.
  bool land(const std::shared_ptr<IncomingRoom>& room) {
    if (room->layout_.num_pages() == 0) return true;
    const std::size_t freed_before = receiver_.num_freed_;
    try {
      std::unique_ptr<Landing> landing = receiver_.land(room->layout_.bytes());
      const std::lock_guard lock(room->mutex_);
      room->landing_ = std::move(landing);
      return true;
    } catch (const TransferError& e) {
      if (receiver_.num_landings_ == 0 && receiver_.num_freed_ == freed_before) {
        room->fail(Trouble::kMemory, e.what());
      } else {
        {
          const std::lock_guard lock(mutex_);
          waiting_.push_back(room);
        }
        // poll() may have looked before it was there.
        if (receiver_.num_freed_ != freed_before) receiver_.freed_ = true;
      }
      return false;
    }
  }

  /// Hands the room to the reader of this connection; false if it has ended and takes no more.
  bool enter(const Connection& connection, const std::shared_ptr<IncomingRoom>& room) {
    const std::lock_guard lock(mutex_);
    if (connection_.get() != &connection) return false;
    if (!rooms_.emplace(room->room_, room).second) throw Taken("another request has the room");
    return true;
  }

  static void send_ask(Connection& connection, IncomingRoom& room) {
    std::string landing;
    {
      const std::lock_guard lock(room.mutex_);
      if (room.landing_) landing = room.landing_->address();
    }
    connection.send({{"kind", "ask"},
                     {"room", room.room_},
                     {"digest", room.digest_},
                     {"tokens", room.num_tokens_},
                     {"pages", room.layout_.num_pages()},
                     {"landing", landing}});
  }

  class Refused : public TransferError {
   public:
    using TransferError::TransferError;
  };
  class Taken : public TransferError {
   public:
    using TransferError::TransferError;
  };

  /// The connection, a new one if there is none. By the asker's thread.
  std::shared_ptr<Connection> connected() {
    {
      const std::lock_guard lock(mutex_);
      if (connection_) return connection_;
    }
    if (Clock::now() < pause_end_) {
      if (refused_) throw Refused(trouble_);
      throw TransferError(trouble_);
    }
    if (reader_.joinable()) reader_.join();  // it has ended with its connection
    try {
      const PageReceiver::Options& options = receiver_.options_;
      auto connection = std::make_shared<Connection>(Connection::connect(host_, port_, kConnectPatience));
      connection->send({{"kind", "hello"},
                        {"key", options.key},
                        {"identity", to_json(options.identity)},
                        {"transport", receiver_.transport_.name()},
                        {"description", to_hex(receiver_.transport_.describe())}});
      const std::optional<Json> answer = connection->receive(Clock::now() + kWelcomePatience);
      if (!answer) throw TransferError("the prefill server does not answer");
      if (text_of(*answer, "kind") != "welcome")
        throw Refused("the prefill server refuses this one: " + text_of(*answer, "reason").substr(0, 1000));
      const std::lock_guard lock(mutex_);
      connection_ = connection;
      reader_ = std::jthread([this, connection] { read(connection); });
      return connection;
    } catch (const TransferError& e) {
      trouble_ = e.what();
      refused_ = dynamic_cast<const Refused*>(&e) != nullptr;
      pause_end_ = Clock::now() + kPause;
      throw;
    }
  }

  void read(const std::shared_ptr<Connection>& connection) {
    pthread_setname_np(pthread_self(), "kv-receive");
    std::string why;
    try {
      while (!ending_) {
        const std::optional<Json> message = connection->receive(Clock::now() + kSweep);
        if (message) take(*message);
        check_dropped();
      }
    } catch (const std::exception& e) {
      why = e.what();
    }
    connection->close();
    std::map<std::int64_t, std::shared_ptr<IncomingRoom>> rooms;
    {
      const std::lock_guard lock(mutex_);
      connection_.reset();
      rooms.swap(rooms_);
    }
    // The server writes no more: it has noticed the end of the connection, or has ended itself.
    for (const auto& [number, room] : rooms) {
      room->fail(Trouble::kGone, why);
      free_landing(*room);
    }
    receiver_.options_.on_news();
  }

  void take(const Json& message) {
    const std::string kind = text_of(message, "kind");
    const std::int64_t number = integer_of(message, "room");
    std::shared_ptr<IncomingRoom> room;
    {
      const std::lock_guard lock(mutex_);
      const auto it = rooms_.find(number);
      if (it == rooms_.end()) return;  // it has ended here
      room = it->second;
    }
    if (kind == "wrote") {
      room->note_written(message);
      return;
    }
    if (kind != "done" && kind != "failed")
      throw TransferError("the prefill server has said what is no message");
    if (kind == "done") {
      room->note_done();
    } else {
      room->fail(Trouble::kGivenUp, "the prefill server: " + text_of(message, "reason").substr(0, 1000));
    }
    {
      const std::lock_guard lock(mutex_);
      rooms_.erase(number);
    }
    if (!room->arrived() || room->dropped_) free_landing(*room);
    receiver_.options_.on_news();
  }

  static void free_landing(IncomingRoom& room) {
    const std::lock_guard lock(room.mutex_);
    room.landing_.reset();
  }

  void check_dropped() {
    const std::lock_guard lock(mutex_);
    for (const auto& [number, room] : rooms_) {
      if (room->dropped_ && Clock::now() > room->dropped_at_ + kDropPatience)
        throw TransferError("the prefill server does not let go of a room");
    }
  }

  PageReceiver& receiver_;
  const std::string host_;
  const int port_;
  Clock::time_point pause_end_{};  // of the asker's thread, as are the next two
  std::string trouble_;
  bool refused_ = false;
  std::atomic<bool> ending_ = false;

  std::mutex mutex_;  // of what follows
  std::shared_ptr<Connection> connection_;
  std::map<std::int64_t, std::shared_ptr<IncomingRoom>> rooms_;  // that the server knows
  std::deque<std::shared_ptr<IncomingRoom>> waiting_;            // for memory

  std::jthread reader_;
  TaskThread asker_;  // last: it makes the reader
};

PageReceiver::PageReceiver(PageTransport& transport, Options options)
    : transport_(transport), options_(std::move(options)) {}

PageReceiver::~PageReceiver() = default;

std::unique_ptr<Landing> PageReceiver::land(std::size_t bytes) {
  std::unique_ptr<Landing> landing = transport_.land(bytes);
  ++num_landings_;
  return std::make_unique<CountedLanding>(std::move(landing), [this] { note_freed(); });
}

void PageReceiver::note_freed() {
  --num_landings_;
  ++num_freed_;
  freed_ = true;
  options_.on_news();
}

void PageReceiver::check_peer(const std::string& host, int port) const {
  if (port < 1 || port > 65535)
    throw InvalidArgument(fmt::format("bootstrap_port is {}, expected 1 to 65535", port));
  const std::string name = fmt::format("{}:{}", host, port);
  const auto& peers = options_.peers;
  if (std::ranges::find(peers, name) == peers.end() && std::ranges::find(peers, "*") == peers.end()) {
    throw InvalidArgument(
        fmt::format("bootstrap_host and bootstrap_port are {}, expected one of --peer", Json(name).dump()));
  }
}

PageReceiver::Link& PageReceiver::link_to(const std::string& host, int port) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Link>& link = links_[{host, port}];
  if (!link) {
    if (links_.size() > kMaxLinks) {
      links_.erase({host, port});
      throw InvalidArgument(
          fmt::format("bootstrap_host is \"{}\": more than {} prefill servers", host, kMaxLinks));
    }
    link = std::make_unique<Link>(*this, host, port);
  }
  return *link;
}

std::shared_ptr<IncomingRoom> PageReceiver::ask(const std::string& host, int port, std::int64_t room,
                                                std::span<const std::int32_t> tokens, bool with_pages) {
  check_peer(host, port);
  Link& link = link_to(host, port);
  auto out = std::make_shared<IncomingRoom>();
  out->room_ = room;
  out->num_tokens_ = std::ssize(tokens);
  out->digest_ = digest_of(tokens);
  out->layout_ =
      PageLayout(options_.identity, with_pages ? options_.identity.pages_for(out->num_tokens_) : 0);
  out->covered_.resize(static_cast<std::size_t>(out->layout_.num_layers() * out->layout_.num_pages()));
  out->begin_ = Clock::now();
  out->end_ = out->begin_ + std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(options_.lease_seconds));
  out->link_ = {host, port};
  link.ask(out);
  return out;
}

void PageReceiver::drop(const std::shared_ptr<IncomingRoom>& room) {
  if (room->dropped_.exchange(true)) return;
  room->dropped_at_ = Clock::now();
  if (room->arrived()) {  // the server has nothing to do with it any more
    const std::lock_guard lock(room->mutex_);
    room->landing_.reset();
    return;
  }
  room->fail(Trouble::kGivenUp, "nobody waits for it");
  link_to(room->link_.first, room->link_.second).drop(room);
}

void PageReceiver::poll() {
  const std::lock_guard lock(mutex_);
  const bool freed = freed_.exchange(false);
  for (const auto& [peer, link] : links_) {
    link->sweep();
    if (freed) link->retry();
  }
}

}  // namespace flash_mla::transfer
