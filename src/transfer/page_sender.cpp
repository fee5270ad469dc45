#include "transfer/page_sender.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "flash_mla/error.h"
#include "transfer/key.h"

namespace flash_mla::transfer {
namespace {

constexpr auto kHelloPatience = std::chrono::seconds(10);
constexpr auto kSweep = std::chrono::milliseconds(250);
constexpr std::size_t kMaxLinks = 256;
// Rooms that decode sides ask for before the prefill's request is there.
constexpr std::size_t kMaxRooms = 65536;
// Of a digest, and of a landing's address.
constexpr std::size_t kMaxWordBytes = 256;

Clock::time_point in(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

/// A decode server that is connected.
struct OutgoingRoom::Link {
  explicit Link(Connection c) : connection(std::move(c)) {}
  Connection connection;
  std::unique_ptr<Peer> peer;  // once it is welcome
  std::mutex writing;          // what is made of it: one at a time, whichever rank's pages they are
  std::uint64_t id = 0;
  std::atomic<bool> ended = false;

  void tell_failed(std::int64_t room, const std::string& reason) {
    connection.send({{"kind", "failed"}, {"room", room}, {"reason", reason}});
  }
};

OutgoingRoom::OutgoingRoom(PageSender& sender, std::int64_t room, std::string digest, std::int64_t num_tokens,
                           Clock::time_point deadline)
    : sender_(sender),
      room_(room),
      digest_(std::move(digest)),
      num_tokens_(num_tokens),
      deadline_(deadline) {}

OutgoingRoom::~OutgoingRoom() {
  fail("the prefill server has given the request up");
  sender_.leave(*this);
}

std::size_t OutgoingRoom::write(int layer, std::int64_t page, std::int64_t count, const std::byte* bytes) {
  if (!wanted()) return 0;
  if (layer < -1 || layer >= layout_.num_layers() || page < 0 || count < 0 ||
      page + count > layout_.num_pages())
    throw std::logic_error(fmt::format("write: pages {} to {} of layer {}", page, page + count, layer));
  std::vector<Piece> pieces = layout_.pieces(layer, page, count);
  std::size_t sum = 0;
  for (Piece& piece : pieces) {
    piece.from = bytes + sum;
    sum += piece.bytes;
  }
  try {
    {
      const std::lock_guard lock(link_->writing);
      target_->write(pieces, end_);
    }
    if (over_) return 0;
    link_->connection.send({{"kind", "wrote"},
                            {"room", room_},
                            {"layer", layer},
                            {"page", page},
                            {"count", count},
                            {"checksum", fmt::format("{:016x}", checksum(pieces))}});
    return sum;
  } catch (const TransferError& e) {
    fail(e.what());
    return 0;
  }
}

void OutgoingRoom::finish() {
  if (!asked_ || over_.exchange(true)) return;
  try {
    link_->connection.send({{"kind", "done"}, {"room", room_}});
  } catch (const TransferError&) {
    // Whoever has gone computes it himself, or not at all.
  }
}

void OutgoingRoom::fail(const std::string& reason) {
  if (over_.exchange(true) || !asked_) return;
  try {
    link_->tell_failed(room_, reason);
  } catch (const TransferError&) {
    // As above.
  }
}

PageSender::PageSender(PageTransport& transport, Options options)
    : transport_(transport),
      options_(std::move(options)),
      listener_(options_.host, options_.port),
      acceptor_([this] { accept(); }) {}

PageSender::~PageSender() {
  listener_.close();
  acceptor_.join();
  std::list<std::pair<std::shared_ptr<Link>, std::jthread>> links;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    links.swap(links_);
  }
  for (const auto& [link, thread] : links) link->connection.close();
}

void PageSender::accept() {
  pthread_setname_np(pthread_self(), "kv-accept");
  while (std::optional<Connection> connection = listener_.accept()) {
    const std::lock_guard lock(mutex_);
    std::erase_if(links_, [](const auto& link) { return link.first->ended.load(); });
    if (links_.size() >= kMaxLinks) continue;  // closes it
    auto link = std::make_shared<Link>(std::move(*connection));
    link->id = next_peer_++;
    links_.emplace_back(link, std::jthread([this, link] { serve(link); }));
  }
}

void PageSender::serve(const std::shared_ptr<Link>& link) {
  pthread_setname_np(pthread_self(), "kv-rooms");
  try {
    welcome(*link);
    for (;;) {
      const std::optional<Json> message = link->connection.receive(Clock::now() + kSweep);
      if (message) take(link, *message);
      sweep();
    }
  } catch (const std::exception&) {
    link->connection.close();
  }
  forget(*link);
  link->ended = true;
}

// Nothing is done for a peer before it has said that it has the key and pages of the same kind.
void PageSender::welcome(Link& link) {
  const std::optional<Json> hello = link.connection.receive(Clock::now() + kHelloPatience);
  if (!hello || text_of(*hello, "kind") != "hello") throw TransferError("a peer has said no hello");
  try {
    if (!is_same_key(text_of(*hello, "key"), options_.key))
      throw TransferError("the key is wrong (--peer-key)");
    const auto identity = hello->find("identity");
    check_same(options_.identity, identity == hello->end() ? Json::object() : *identity);
    if (const std::string name = text_of(*hello, "transport"); name != transport_.name())
      throw TransferError(fmt::format("transport is {}, expected {}", Json(name).dump(), transport_.name()));
    link.peer = transport_.reach(from_hex(text_of(*hello, "description")));
  } catch (const TransferError& e) {
    link.connection.send({{"kind", "refused"}, {"reason", e.what()}});
    throw;
  }
  link.connection.send({{"kind", "welcome"}});
}

void PageSender::take(const std::shared_ptr<Link>& link, const Json& message) {
  const std::string kind = text_of(message, "kind");
  const std::int64_t room = integer_of(message, "room");
  if (kind == "ask") {
    try {
      take_ask(link, room, message);
    } catch (const TransferError& e) {
      link->tell_failed(room, e.what());
    }
  } else if (kind == "drop") {
    std::shared_ptr<OutgoingRoom> expected;
    {
      const std::lock_guard lock(mutex_);
      const auto it = rooms_.find(room);
      if (it == rooms_.end()) return;
      if (it->second.ask && it->second.ask->link == link) it->second.ask.reset();
      expected = it->second.expected.lock();
      if (!expected) rooms_.erase(it);
    }
    if (expected && expected->asked_ && expected->link_ == link) {
      expected->fail("dropped");
    } else {
      link->tell_failed(room, "dropped");
    }
  } else {
    throw TransferError("a peer has said what is no message");
  }
}

void PageSender::take_ask(const std::shared_ptr<Link>& link, std::int64_t room, const Json& message) {
  Ask ask{link,
          text_of(message, "digest"),
          text_of(message, "landing"),
          integer_of(message, "tokens"),
          integer_of(message, "pages"),
          in(options_.lease_seconds)};
  if (ask.digest.size() > kMaxWordBytes || ask.landing.size() > kMaxWordBytes)
    throw TransferError(fmt::format("digest or landing has more than {} bytes", kMaxWordBytes));
  std::shared_ptr<OutgoingRoom> expected;
  {
    const std::lock_guard lock(mutex_);
    if (rooms_.size() >= kMaxRooms) throw TransferError("too many rooms wait");
    Entry& entry = rooms_[room];
    expected = entry.expected.lock();
    if (entry.ask || (expected && expected->asked_)) throw TransferError("the room is in use");
    if (!expected) entry.ask = ask;
  }
  if (expected) match(*expected, ask);
}

// The room is what the decode side takes it for: it begins. Throws TransferError, for the decode side, if not; the room
// then waits on for one that fits.
void PageSender::match(OutgoingRoom& room, const Ask& ask) {
  if (ask.digest != room.digest_ || ask.num_tokens != room.num_tokens_) {
    throw TransferError(fmt::format("the prompt has {} tokens and digest {}, expected {} and {}",
                                    ask.num_tokens, Json(ask.digest.substr(0, 64)).dump(), room.num_tokens_,
                                    "that of the prefill's prompt"));
  }
  const std::int64_t all = options_.identity.pages_for(ask.num_tokens);
  if (ask.num_pages != 0 && ask.num_pages != all)
    throw TransferError(fmt::format("pages is {}, expected 0 or {}", ask.num_pages, all));
  std::unique_ptr<Target> target;
  const PageLayout layout(options_.identity, ask.num_pages);
  if (ask.num_pages > 0) target = ask.link->peer->open(ask.landing, layout.bytes());
  room.link_ = ask.link;
  room.target_ = std::move(target);
  room.layout_ = layout;
  room.peer_ = ask.link->id;
  room.end_ = ask.end;
  room.asked_ = true;
  // Nobody listens any more: forget() may have passed already.
  if (ask.link->ended) room.over_ = true;
  options_.on_news();
}

std::shared_ptr<OutgoingRoom> PageSender::expect(std::int64_t room, std::string digest,
                                                 std::int64_t num_tokens) {
  std::shared_ptr<OutgoingRoom> out(
      new OutgoingRoom(*this, room, std::move(digest), num_tokens, in(options_.lease_seconds)));
  std::optional<Ask> ask;
  {
    const std::lock_guard lock(mutex_);
    Entry& entry = rooms_[room];
    if (entry.expected.lock())
      throw InvalidArgument(fmt::format("bootstrap_room is {}, which another request has", room));
    entry.expected = out;
    ask = std::exchange(entry.ask, std::nullopt);
  }
  if (!ask) return out;
  try {
    match(*out, *ask);
  } catch (const TransferError& e) {
    try {
      ask->link->tell_failed(room, e.what());
    } catch (const TransferError&) {
      // It has gone.
    }
  }
  return out;
}

std::size_t PageSender::num_rooms() const {
  const std::lock_guard lock(mutex_);
  return rooms_.size();
}

// A peer has gone: its rooms are over.
void PageSender::forget(const Link& link) {
  std::vector<std::shared_ptr<OutgoingRoom>> over;
  {
    const std::lock_guard lock(mutex_);
    for (auto it = rooms_.begin(); it != rooms_.end();) {
      Entry& entry = it->second;
      if (entry.ask && entry.ask->link.get() == &link) entry.ask.reset();
      std::shared_ptr<OutgoingRoom> room = entry.expected.lock();
      const bool empty = !room && !entry.ask;
      if (room && room->asked_ && room->link_.get() == &link) over.push_back(std::move(room));
      it = empty ? rooms_.erase(it) : std::next(it);
    }
  }
  for (const auto& room : over) room->over_ = true;
  options_.on_news();
}

// Rooms that somebody has asked for, and for which no request has come in time.
void PageSender::sweep() {
  std::vector<std::pair<std::int64_t, std::shared_ptr<Link>>> late;
  {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    for (auto it = rooms_.begin(); it != rooms_.end();) {
      Entry& entry = it->second;
      if (entry.ask && now > entry.ask->end) {
        late.emplace_back(it->first, entry.ask->link);
        entry.ask.reset();
      }
      it = !entry.ask && entry.expected.expired() ? rooms_.erase(it) : std::next(it);
    }
  }
  for (const auto& [room, link] : late) {
    try {
      link->tell_failed(room, "the lease is over: no request for the room has come to the prefill server");
    } catch (const TransferError&) {
      // It has gone.
    }
  }
}

void PageSender::leave(const OutgoingRoom& room) {
  const std::lock_guard lock(mutex_);
  const auto it = rooms_.find(room.room_);
  if (it != rooms_.end() && it->second.expected.expired() && !it->second.ask) rooms_.erase(it);
}

}  // namespace flash_mla::transfer
