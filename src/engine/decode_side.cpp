#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "base/page_size.h"
#include "base/task_thread.h"
#include "engine/held_pages.h"
#include "engine/peer_side.h"
#include "engine/scheduler.h"
#include "flash_mla/error.h"

// A request's pages come from a prefill server to a landing while it waits in the queue; when it joins they are copied to
// the pages that it gets. So what waits takes none of the cache. Whatever goes wrong, it runs as any other does.

namespace flash_mla::engine {
namespace {

using transfer::PageReceiver;

class DecodeSide : public PeerSide {
 public:
  explicit DecodeSide(PeerSetup setup)
      : PeerSide(std::move(setup.hub)),
        model_(setup.model),
        pool_(setup.pool),
        on_news_(std::move(setup.on_news)),
        receiver_(hub().receiver()),
        uploads_(model_.make_page_copies()),
        held_(setup.pool),
        loader_(std::make_unique<TaskThread>("kv-load")) {}
  ~DecodeSide() override {
    loader_.reset();
    // Landings end before what they were made by.
    for_tickets([this](PeerTicket& ticket) {
      give_up(ticket);
      ticket.incoming.reset();
    });
  }

  void check(const BootstrapRoom& room) const override { receiver_.check_peer(room.host, room.port); }

  void look_up(Sequence& sequence, std::span<const std::int32_t> tokens) override {
    forget(sequence);
    const std::optional<BootstrapRoom> room = std::exchange(sequence.room, std::nullopt);
    if (!room) return;
    // The prefill server is told, too, where nothing can be used or all is here.
    const std::int64_t all = std::ssize(sequence.tokens);
    const bool usable = !tokens.empty() && std::ssize(tokens) + 1 == all;
    const std::int64_t cached = pool_.cached_prefix(sequence.tokens);
    const bool wanted = usable && (cached == 0 || all - cached > kPageSize);
    auto ticket = std::make_shared<PeerTicket>();
    ticket->prefix_tokens = std::ssize(tokens);
    hub().count([](TransferStats& s) { ++s.rooms; });
    try {
      ticket->incoming = receiver_.ask(room->host, room->port, room->room, sequence.tokens, wanted);
    } catch (const std::exception& e) {
      hub().fall_back("refused", e.what());
      return;
    }
    if (!wanted) {
      hub().fall_back("unneeded");
      return;
    }
    admit(sequence, std::move(ticket));
  }

  std::optional<std::int64_t> found(Sequence& sequence) override {
    if (!sequence.peer_ticket) return 0;
    PeerTicket& ticket = *sequence.peer_ticket;
    if (!ticket.incoming->settled()) return std::nullopt;
    if (ticket.incoming->arrived()) return ticket.prefix_tokens;
    hub().fall_back(trouble_name(ticket.incoming->trouble()), ticket.incoming->reason());
    forget(sequence);
    return 0;
  }

  void load(Sequence& sequence, std::int64_t end) override {
    PeerTicket& ticket = *sequence.peer_ticket;
    ticket.pages.assign(sequence.pages.pages().begin(), sequence.pages.pages().end());
    ticket.begin = ticket.loaded = sequence.num_computed();
    ticket.end = end;
    ticket.loading = true;
    try {
      uploads_->follow_steps();
    } catch (const std::exception&) {
      ticket.done = true;  // the device has failed
      return;
    }
    loader_->post([this, ticket = sequence.peer_ticket] { do_load(*ticket); });
  }

  std::optional<std::int64_t> loaded(Sequence& sequence) override {
    PeerTicket& ticket = *sequence.peer_ticket;
    if (!ticket.done) return std::nullopt;
    const std::int64_t loaded = ticket.loaded;
    if (loaded == ticket.end) {
      hub().count([&](TransferStats& s) {
        ++s.handed_over;
        s.bytes += static_cast<std::int64_t>(ticket.incoming->bytes());
        s.seconds += ticket.incoming->seconds();
      });
    } else {
      const transfer::Trouble trouble = ticket.incoming->trouble();
      hub().fall_back(trouble == transfer::Trouble::kNone ? "memory" : trouble_name(trouble),
                      ticket.incoming->reason());
    }
    give_up(ticket);
    sequence.peer_ticket.reset();
    --hub().open;
    return loaded;
  }

  bool has_loaded(const Sequence& sequence) const override { return sequence.peer_ticket->done; }

  void forget(Sequence& sequence) override {
    const std::shared_ptr<PeerTicket> ticket = std::exchange(sequence.peer_ticket, nullptr);
    if (!ticket) return;
    --hub().open;
    if (ticket->loading && !ticket->done) {
      held_.hold(std::move(sequence.pages), [ticket] { return ticket->done.load(); });
      return;
    }
    give_up(*ticket);
  }

  bool holds_pages() const override { return !held_.empty(); }
  void poll() override {
    held_.poll();
    receiver_.poll();
  }

 private:
  void give_up(PeerTicket& ticket) {
    if (ticket.incoming) receiver_.drop(ticket.incoming);
  }

  void do_load(PeerTicket& ticket) {
    try {
      // On a GPU it is page-locked, which takes longer than the copy: it stays for the next.
      if (memory_.bytes() < ticket.incoming->bytes()) {
        memory_ = {};
        memory_ = model_.allocate_host(ticket.incoming->bytes());
      }
      if (ticket.incoming->take({memory_.data(), ticket.incoming->bytes()})) {
        // What the prefix cache had is not touched: others may read it.
        std::vector<std::int32_t> pages(static_cast<std::size_t>(ticket.incoming->num_pages()), -1);
        for (std::size_t i = 0; i < std::min(pages.size(), ticket.pages.size()); ++i) {
          if (static_cast<std::int64_t>(i) * kPageSize >= ticket.begin) pages[i] = ticket.pages[i];
        }
        uploads_->upload(pages, memory_.data());
        uploads_->mark()->wait();
        ticket.loaded = ticket.end;
      }
    } catch (const std::exception&) {
      ticket.loaded = ticket.begin;  // no memory, or the device has failed
      memory_ = {};
    }
    ticket.done = true;
    on_news_();
  }

  model::Model& model_;
  kv::PagePool& pool_;
  const std::function<void()> on_news_;
  PageReceiver& receiver_;
  std::unique_ptr<model::PageCopies> uploads_;
  HeldPages held_;
  Buffer memory_;                       // of the loader's thread
  std::unique_ptr<TaskThread> loader_;  // last: it uses the others
};

}  // namespace

std::unique_ptr<PeerLoader> make_decode_side(PeerSetup setup) {
  return std::make_unique<DecodeSide>(std::move(setup));
}

}  // namespace flash_mla::engine
