#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "base/page_size.h"
#include "base/task_thread.h"
#include "engine/chunk_memory.h"
#include "engine/held_pages.h"
#include "engine/peer_side.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "flash_mla/error.h"

// A request with a room waits until a decode server has asked for its pages, without any of the cache. What its steps
// compute is copied to the host and sent by a thread for each decode server; no step waits for that.

namespace flash_mla::engine {
namespace {

// Pages, in all layers, of a piece that is copied and sent as one.
constexpr std::int64_t kPiecePages = 8;

class PrefillSide : public PeerSide {
 public:
  explicit PrefillSide(PeerSetup setup)
      : PeerSide(std::move(setup.hub)),
        model_(setup.model),
        pool_(setup.pool),
        layerwise_tokens_(setup.options.layerwise_tokens),
        layer_bytes_(setup.model.layer_page_bytes()),
        memory_(std::make_shared<ChunkMemory>(
            setup.model,
            kPiecePages * std::accumulate(layer_bytes_.begin(), layer_bytes_.end(), std::size_t{0}))),
        downloads_(setup.model.make_page_copies()),
        held_(setup.pool) {
    tells_layers_ = model_.set_on_layer([this](int layer) { layer_computed(layer); });
  }
  ~PrefillSide() override {
    model_.set_on_layer(nullptr);
    threads_.clear();
    for_tickets([](PeerTicket& ticket) { ticket.outgoing.reset(); });
  }

  void check(const BootstrapRoom&) const override {}

  void look_up(Sequence& sequence, std::span<const std::int32_t> /*tokens*/) override {
    const std::optional<BootstrapRoom> room = std::exchange(sequence.room, std::nullopt);
    if (!room) return;  // none, or it comes back after a preemption
    hub().count([](TransferStats& s) { ++s.rooms; });
    auto ticket = std::make_shared<PeerTicket>();
    try {
      ticket->prompt_tokens = std::ssize(sequence.tokens);
      ticket->by_layer = ticket->prompt_tokens >= layerwise_tokens_;
      ticket->outgoing =
          hub().sender().expect(room->room, transfer::digest_of(sequence.tokens), ticket->prompt_tokens);
    } catch (const std::exception& e) {
      ticket->refused = true;
      refuse(sequence, "refused", e.what());
    }
    admit(sequence, std::move(ticket));
  }

  std::optional<std::int64_t> found(Sequence& sequence) override {
    if (!sequence.peer_ticket) return 0;
    PeerTicket& ticket = *sequence.peer_ticket;
    if (ticket.refused) return std::nullopt;
    if (ticket.outgoing->asked()) return 0;
    if (ticket.outgoing->late()) {
      ticket.refused = true;
      refuse(sequence, "late",
             "bootstrap_room: no decode server has asked for its pages before the lease was over");
    }
    return std::nullopt;
  }

  std::vector<std::pair<Sequence*, std::string>> refused() override { return std::exchange(refused_, {}); }

  // Nothing is ever found.
  void load(Sequence&, std::int64_t /*end*/) override {}
  std::optional<std::int64_t> loaded(Sequence&) override { return 0; }
  bool has_loaded(const Sequence&) const override { return true; }

  void skip(Sequence&) override {}
  void forget(Sequence& sequence) override {
    const std::shared_ptr<PeerTicket> ticket = std::exchange(sequence.peer_ticket, nullptr);
    if (!ticket) return;
    --hub().open;
    std::erase_if(refused_, [&](const auto& r) { return r.first == &sequence; });
    if (ticket->outgoing && ticket->outgoing->asked()) {
      if (!ticket->finished) {
        thread_of(*ticket).post(
            [out = ticket->outgoing] { out->fail("the prefill server has ended the request"); });
        hub().fall_back("ended");
      }
      hold(sequence, *ticket);
    }
  }

  bool holds_pages() const override { return !held_.empty(); }
  void poll() override {
    held_.poll();
    std::erase_if(threads_,
                  [](const auto& t) { return t.second.thread->num_tasks() == 0 && t.second.is_old(); });
  }

  void launching(const StepPlan& plan) override {
    running_.clear();
    for (const ScheduledWork& work : plan.work) {
      PeerTicket* const ticket = work.sequence->peer_ticket.get();
      if (ticket == nullptr || !ticket->by_layer || !ticket->outgoing->wanted() || !tells_layers_) continue;
      ticket->step_pages = whole_pages(*ticket, work.begin + work.count);
      ticket->told_layers = 0;
      running_.push_back(work.sequence);
    }
  }

  void store(Sequence& sequence) override {
    const std::shared_ptr<PeerTicket>& ticket = sequence.peer_ticket;
    if (!ticket || ticket->finished || !ticket->outgoing) return;
    const std::int64_t computed = sequence.num_computed();
    const bool last = computed >= ticket->prompt_tokens;
    if (last) ticket->computed = true;
    if (ticket->outgoing->wanted() && (last || ticket->by_layer)) {
      const std::int64_t end = whole_pages(*ticket, computed);
      if (ticket->told_layers == 0) {
        send_all_layers(sequence, end);
      } else {  // those that nobody tells of: the module's for multi-token prediction
        for (int layer = ticket->told_layers; layer < num_layers(); ++layer) send_layer(sequence, layer, end);
      }
      ticket->sent_pages = end;
      ticket->told_layers = 0;
    }
    if (!last) return;
    ticket->finished = true;
    const bool whole = ticket->outgoing->wanted();
    if (!whole) hub().fall_back("left");
    thread_of(*ticket).post([this, ticket, whole] {
      const bool over = ticket->outgoing->over();
      ticket->outgoing->finish();
      if (!whole) return;
      if (over) {
        hub().fall_back("left");
      } else {
        hub().count([](TransferStats& s) { ++s.handed_over; });
      }
    });
  }

 private:
  /// Of a decode server.
  struct Thread {
    std::unique_ptr<TaskThread> thread = std::make_unique<TaskThread>("kv-send");
    Clock::time_point used = Clock::now();
    bool is_old() const { return Clock::now() > used + std::chrono::seconds(10); }
  };

  int num_layers() const { return static_cast<int>(layer_bytes_.size()); }

  /// Pages that do not change any more once so many tokens are computed: full ones, and the prompt's last.
  static std::int64_t whole_pages(const PeerTicket& ticket, std::int64_t tokens) {
    return (tokens >= ticket.prompt_tokens ? ticket.prompt_tokens + kPageSize - 1 : tokens) / kPageSize;
  }

  // From within the step, by the thread that steps.
  void layer_computed(int layer) {
    for (Sequence* const sequence : running_) {
      PeerTicket& ticket = *sequence->peer_ticket;
      if (!ticket.outgoing->wanted() || layer != ticket.told_layers) continue;
      send_layer(*sequence, layer, ticket.step_pages);
      ticket.told_layers = layer + 1;
    }
  }

  void send_all_layers(Sequence& sequence, std::int64_t end) {
    for (std::int64_t page = sequence.peer_ticket->sent_pages; page < end; page += kPiecePages)
      send(sequence, -1, page, std::min(kPiecePages, end - page));
  }
  void send_layer(Sequence& sequence, int layer, std::int64_t end) {
    const auto most =
        static_cast<std::int64_t>(memory_->chunk_bytes() / layer_bytes_[static_cast<std::size_t>(layer)]);
    for (std::int64_t page = sequence.peer_ticket->sent_pages; page < end; page += most)
      send(sequence, layer, page, std::min(most, end - page));
  }

  // What cannot be copied ends the room.
  void send(Sequence& sequence, int layer, std::int64_t page, std::int64_t count_) {
    const std::shared_ptr<PeerTicket> ticket = sequence.peer_ticket;
    TaskThread& thread = thread_of(*ticket);
    try {
      Buffer bytes = memory_->take();
      const auto pages =
          sequence.pages.pages().subspan(static_cast<std::size_t>(page), static_cast<std::size_t>(count_));
      downloads_->follow_steps();
      if (layer < 0) {
        downloads_->download(pages, bytes.data());
      } else {
        downloads_->download(layer, pages, bytes.data());
      }
      const std::shared_ptr<model::CopyMark> mark = downloads_->mark();
      last_mark_ = mark;
      if (!mark->done()) {
        const auto full = static_cast<int>(std::min(page + count_, sequence.num_computed() / kPageSize));
        held_.hold(pool_.share(sequence.pages, full), [mark] { return is_over(*mark); });
      }
      thread.post([this, ticket, mark, bytes, layer, page, count_] {
        do_send(*ticket, *mark, bytes, layer, page, count_);
      });
    } catch (const std::exception&) {
      thread.post([out = ticket->outgoing] { out->fail("the prefill server could not copy the pages"); });
    }
  }

  void do_send(PeerTicket& ticket, model::CopyMark& mark, const Buffer& bytes, int layer, std::int64_t page,
               std::int64_t count_) {
    try {
      mark.wait();
    } catch (const std::exception&) {
      ticket.outgoing->fail("the prefill server's device has failed");
      return;
    }
    const bool computing = !ticket.computed;
    const Clock::time_point begin = Clock::now();
    const std::size_t sent = ticket.outgoing->write(layer, page, count_, bytes.data());
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    hub().count([&](TransferStats& s) {
      s.bytes += static_cast<std::int64_t>(sent);
      s.seconds += seconds;
      if (computing) s.overlapped_seconds += seconds;
    });
  }

  // Where copies are still being made of its pages, they outlive the sequence.
  void hold(Sequence& sequence, const PeerTicket& ticket) {
    if (!last_mark_ || ticket.sent_pages == 0) return;
    if (!is_over(*last_mark_))
      held_.hold(std::move(sequence.pages), [mark = last_mark_] { return is_over(*mark); });
  }

  TaskThread& thread_of(const PeerTicket& ticket) {
    Thread& thread = threads_[ticket.outgoing->peer()];
    thread.used = Clock::now();
    return *thread.thread;
  }

  void refuse(Sequence& sequence, const std::string& why, const std::string& message) {
    refused_.emplace_back(&sequence, message);
    hub().fall_back(why, message);
  }

  model::Model& model_;
  kv::PagePool& pool_;
  const std::int64_t layerwise_tokens_;
  const std::vector<std::size_t> layer_bytes_;
  bool tells_layers_ = false;
  std::shared_ptr<ChunkMemory> memory_;
  std::unique_ptr<model::PageCopies> downloads_;
  std::shared_ptr<model::CopyMark> last_mark_;  // of all copies so far
  HeldPages held_;
  std::vector<Sequence*> running_;  // sequences of the step that runs whose layers go at once
  std::vector<std::pair<Sequence*, std::string>> refused_;

  std::map<std::uint64_t, Thread> threads_;  // last: they use the others
};

}  // namespace

std::unique_ptr<PeerLoader> make_prefill_side(PeerSetup setup) {
  return std::make_unique<PrefillSide>(std::move(setup));
}

}  // namespace flash_mla::engine
