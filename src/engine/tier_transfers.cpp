#include "engine/tier_transfers.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <exception>
#include <utility>

#include "base/page_size.h"

namespace flash_mla::engine {

using kv::kChunkPages;
using kv::kChunkTokens;

struct TierTicket {
  std::vector<std::int32_t> tokens;  // that are looked up
  Clock::time_point give_up{};       // when nobody waits any longer for what is under way

  // Of the loader's thread, until `answered`.
  std::vector<std::unique_ptr<kv::TierMatch>> matches;  // of each tier, or null
  std::int64_t found = 0;                               // tokens
  std::atomic<bool> answered = false;

  // Of a load.
  std::vector<std::int32_t> pages;  // of the sequence
  std::int64_t begin = 0, end = 0;  // tokens
  std::int64_t loaded = 0;          // until `done` of the loader's thread
  std::atomic<bool> loading = false, hurry = false, done = false;
};

namespace {

// As long as nobody knows how long a prompt takes.
constexpr double kFirstAllowance = 2;
constexpr double kLeastAllowance = 0.02, kMostAllowance = 30;
// How much longer a load may take than it is allowed: what is under way then is nearly there.
constexpr std::chrono::milliseconds kGrace{500};
// A tier that has been in one call for so long is not asked any more until it returns.
constexpr double kStuck = 2;
constexpr std::size_t kMostLookUps = 256;
// Chunks on their way to tiers: that many bytes, but a few chunks always.
constexpr std::size_t kMostStoreBytes = std::size_t{256} << 20, kLeastStores = 4;
// Chunks on their way to the device.
constexpr std::size_t kMostUploads = 4;

double seconds_since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }
Clock::time_point in(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

void end_soon(const std::vector<std::weak_ptr<TierTicket>>& loads) {
  for (const auto& load : loads) {
    if (const auto ticket = load.lock()) ticket->hurry = true;
  }
}

kv::TierConfig tier_config(const TierTransfers::Options& options,
                           const std::shared_ptr<ChunkMemory>& memory) {
  return {options.salt, memory->chunk_bytes(), [memory] { return memory->take(); }, options.shared};
}

}  // namespace

TierTransfers::TierTransfers(model::Model& model, kv::PagePool& pool, Options options,
                             std::shared_ptr<TierSet> shared)
    : pool_(pool),
      on_news_(std::move(options.on_news)),
      wait_seconds_(options.wait_seconds),
      memory_(std::make_shared<ChunkMemory>(model, model.bytes_per_copied_page() * kChunkPages)),
      tiers_(shared ? std::move(shared)
                    : std::make_shared<TierSet>(options.tiers, tier_config(options, memory_))),
      uploads_(model.make_page_copies()),
      downloads_(model.make_page_copies()),
      held_(pool),
      storer_("kv-store"),
      loader_("kv-load") {
  refill();
}

void TierTransfers::refill() {
  try {
    memory_->refill();
  } catch (const std::exception&) {
    // Without memory nothing is stored.
  }
}

TierTransfers::~TierTransfers() { end_soon(loads_); }

// What computing the tokens would take.
double TierTransfers::allowance(std::int64_t tokens) const {
  if (wait_seconds_ > 0) return wait_seconds_;
  if (seconds_per_token_ == 0) return kFirstAllowance;
  return std::clamp(static_cast<double>(tokens) * seconds_per_token_, kLeastAllowance, kMostAllowance);
}

void TierTransfers::prefilled(int tokens, double seconds) {
  if (tokens < 64) return;  // much of the step is something else's
  const double now = seconds / tokens;
  seconds_per_token_ = seconds_per_token_ == 0 ? now : 0.8 * seconds_per_token_ + 0.2 * now;
}

void TierTransfers::look_up(Sequence& sequence, std::span<const std::int32_t> tokens) {
  forget(sequence);
  const auto whole = static_cast<std::int64_t>(tokens.size()) / kChunkTokens * kChunkTokens;
  if (whole == 0 || loader_.num_tasks() >= kMostLookUps || loader_.busy_seconds() > kStuck) return;
  auto ticket = std::make_shared<TierTicket>();
  const std::span<const std::int32_t> chunks = tokens.first(static_cast<std::size_t>(whole));
  ticket->tokens.assign(chunks.begin(), chunks.end());
  ticket->give_up = in(allowance(whole));
  sequence.ticket = ticket;
  loader_.post([this, ticket = std::weak_ptr(ticket)] {
    if (const auto wanted = ticket.lock()) do_look_up(*wanted);
  });
}

void TierTransfers::do_look_up(TierTicket& ticket) {
  const auto asked = static_cast<std::int64_t>(ticket.tokens.size());
  ticket.matches.resize(tiers_->size());
  for (std::size_t i = 0; i < tiers_->size(); ++i) {
    const Clock::time_point begin = Clock::now();
    std::int64_t here = 0;
    bool failed = false;
    try {
      ticket.matches[i] = (*tiers_)[i].look_up(ticket.tokens);
      if (ticket.matches[i]) here = std::min(ticket.matches[i]->num_chunks() * kChunkTokens, asked);
    } catch (const std::exception&) {
      failed = true;
    }
    ticket.found = std::max(ticket.found, here);
    tiers_->count(i, [&](KvTierStats& s) {
      s.tokens_looked_up += asked;
      s.tokens_found += here;
      s.look_up_seconds += seconds_since(begin);
      s.failures += failed;
    });
  }
  ticket.answered = true;
  on_news_();
}

std::optional<std::int64_t> TierTransfers::found(Sequence& sequence) {
  if (!sequence.ticket) return 0;
  if (sequence.ticket->answered) return sequence.ticket->found;
  if (Clock::now() < sequence.ticket->give_up) return std::nullopt;
  forget(sequence);
  return 0;
}

void TierTransfers::load(Sequence& sequence, std::int64_t end) {
  TierTicket& ticket = *sequence.ticket;
  ticket.pages.assign(sequence.pages.pages().begin(), sequence.pages.pages().end());
  ticket.begin = ticket.loaded = sequence.num_computed();
  ticket.end = end;
  ticket.give_up = in(allowance(end - ticket.begin));
  ticket.loading = true;
  try {
    // Whoever had the pages before has launched what it writes to them.
    uploads_->follow_steps();
  } catch (const std::exception&) {
    ticket.done = true;  // the device has failed
    return;
  }
  std::erase_if(loads_, [](const auto& load) { return load.expired(); });
  loads_.push_back(sequence.ticket);
  loader_.post([this, ticket = sequence.ticket] { do_load(*ticket); });
}

// The bytes of a chunk from the first tier that has them.
Buffer TierTransfers::read(TierTicket& ticket, std::int64_t chunk) {
  for (std::size_t i = 0; i < tiers_->size(); ++i) {
    kv::TierMatch* const match = ticket.matches[i].get();
    if (match == nullptr || chunk >= match->num_chunks()) continue;
    const Clock::time_point begin = Clock::now();
    Buffer bytes;
    try {
      bytes = match->read(chunk);
    } catch (const std::exception&) {
      bytes = {};
    }
    const bool good = bytes.data() != nullptr && bytes.bytes() == memory_->chunk_bytes();
    tiers_->count(i, [&](KvTierStats& s) {
      s.load_seconds += seconds_since(begin);
      s.failures += !good;
      s.tokens_loaded += good ? kChunkTokens : 0;
      s.bytes_loaded += good ? static_cast<std::int64_t>(bytes.bytes()) : 0;
    });
    if (!good) continue;
    // The faster tiers before it get it, too.
    if (i > 0) {
      storer_.post([this, i, bytes,
                    tokens = std::vector<std::int32_t>(ticket.tokens.begin(),
                                                       ticket.tokens.begin() + (chunk + 1) * kChunkTokens)] {
        for (std::size_t faster = 0; faster < i; ++faster) store_in(faster, tokens, bytes);
      });
    }
    return bytes;
  }
  return {};
}

void TierTransfers::do_load(TierTicket& ticket) {
  std::deque<std::pair<std::unique_ptr<model::CopyMark>, Buffer>> on_their_way;
  std::int64_t loaded = ticket.begin;
  const auto finish = [&](std::size_t left) {
    for (; on_their_way.size() > left; on_their_way.pop_front()) on_their_way.front().first->wait();
  };
  try {
    for (std::int64_t chunk = ticket.begin / kChunkTokens; chunk < ticket.end / kChunkTokens; ++chunk) {
      if (ticket.hurry || Clock::now() > ticket.give_up) break;
      Buffer bytes = read(ticket, chunk);
      if (bytes.data() == nullptr) break;
      std::array<std::int32_t, kChunkPages> pages{};
      for (int i = 0; i < kChunkPages; ++i) {
        // What the prefix cache had is not touched: others may read it.
        const std::int64_t page = chunk * kChunkPages + i;
        pages[static_cast<std::size_t>(i)] =
            page * kPageSize < ticket.begin ? -1 : ticket.pages[static_cast<std::size_t>(page)];
      }
      uploads_->upload(pages, bytes.data());
      on_their_way.emplace_back(uploads_->mark(), std::move(bytes));
      finish(kMostUploads);
      loaded = (chunk + 1) * kChunkTokens;
    }
  } catch (const std::exception&) {
    // What was loaded before counts.
  }
  try {
    finish(0);
    ticket.loaded = loaded;
  } catch (const std::exception&) {
    // The device has failed: nothing counts.
  }
  ticket.matches.clear();
  ticket.done = true;
  on_news_();
}

bool TierTransfers::has_loaded(const Sequence& sequence) const {
  return sequence.ticket->done || Clock::now() > sequence.ticket->give_up + kGrace;
}

std::optional<std::int64_t> TierTransfers::loaded(Sequence& sequence) {
  TierTicket& ticket = *sequence.ticket;
  if (ticket.done) {
    const std::int64_t loaded = ticket.loaded;
    sequence.num_stored = std::max(sequence.num_stored, loaded / kChunkTokens * kChunkTokens);
    sequence.ticket.reset();
    return loaded;
  }
  // The loader gives up by itself, unless a tier keeps it.
  if (Clock::now() < ticket.give_up + kGrace) return std::nullopt;
  forget(sequence);
  return 0;
}

void TierTransfers::forget(Sequence& sequence) {
  const std::shared_ptr<TierTicket> ticket = std::exchange(sequence.ticket, nullptr);
  if (!ticket) return;
  if (ticket->loading && !ticket->done) {
    ticket->hurry = true;
    held_.hold(std::move(sequence.pages), [ticket] { return ticket->done.load(); });
    return;
  }
  // What a match holds may take a while to let go of.
  if (ticket->answered) loader_.post([ticket] { ticket->matches.clear(); });
}

void TierTransfers::hurry() { end_soon(loads_); }

void TierTransfers::store(Sequence& sequence) {
  const std::int64_t full = sequence.num_computed() / kChunkTokens * kChunkTokens;
  if (sequence.num_stored >= full) return;
  try {
    downloads_->follow_steps();
  } catch (const std::exception&) {
    return;  // the device has failed
  }
  for (; sequence.num_stored < full; sequence.num_stored += kChunkTokens) {
    store_chunk(sequence, sequence.num_stored / kChunkTokens);
  }
}

void TierTransfers::store_chunk(Sequence& sequence, std::int64_t chunk) {
  const std::size_t most = std::max(kLeastStores, kMostStoreBytes / memory_->chunk_bytes());
  const auto drop = [&] {
    for (std::size_t i = 0; i < tiers_->size(); ++i)
      tiers_->count(i, [](KvTierStats& s) { s.tokens_dropped += kChunkTokens; });
  };
  if (storer_.num_tasks() >= most) return drop();
  try {
    Buffer bytes = memory_->take_at_once();
    if (bytes.data() == nullptr) {
      storer_.post([this] { refill(); });
      return drop();
    }
    const std::span<const std::int32_t> pages = sequence.pages.pages();
    downloads_->download(pages.subspan(static_cast<std::size_t>(chunk * kChunkPages), kChunkPages),
                         bytes.data());
    const std::shared_ptr<model::CopyMark> mark = downloads_->mark();
    if (!mark->done()) {
      held_.hold(pool_.share(sequence.pages, static_cast<int>((chunk + 1) * kChunkPages)),
                 [mark] { return is_over(*mark); });
    }
    const auto end = sequence.tokens.begin() + (chunk + 1) * kChunkTokens;
    storer_.post([this, mark, bytes, tokens = std::vector<std::int32_t>(sequence.tokens.begin(), end)] {
      store_everywhere(*mark, tokens, bytes);
    });
  } catch (const std::exception&) {
    drop();  // there is no memory for it
  }
}

void TierTransfers::store_everywhere(model::CopyMark& mark, std::span<const std::int32_t> tokens,
                                     const Buffer& bytes) {
  try {
    mark.wait();
  } catch (const std::exception&) {
    return;  // the device has failed
  }
  for (std::size_t i = 0; i < tiers_->size(); ++i) store_in(i, tokens, bytes);
  refill();
  on_news_();
}

void TierTransfers::store_in(std::size_t tier, std::span<const std::int32_t> tokens, const Buffer& bytes) {
  const Clock::time_point begin = Clock::now();
  bool stored = false;
  try {
    stored = (*tiers_)[tier].store(tokens, bytes);
  } catch (const std::exception&) {
    stored = false;
  }
  tiers_->count(tier, [&](KvTierStats& s) {
    s.store_seconds += seconds_since(begin);
    s.failures += !stored;
    s.tokens_stored += stored ? kChunkTokens : 0;
    s.bytes_stored += stored ? static_cast<std::int64_t>(bytes.bytes()) : 0;
  });
}

void TierTransfers::poll() { held_.poll(); }

}  // namespace flash_mla::engine
