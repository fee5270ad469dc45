#include "engine/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <utility>

#include "base/page_size.h"
#include "flash_mla/error.h"
#include "kv/kv_tier.h"

namespace flash_mla::engine {
namespace {

std::int64_t length(const Sequence& s) { return static_cast<std::int64_t>(s.tokens.size()); }

// What may come from the prefix cache, and one token more, which never does.
std::span<const std::int32_t> reusable(const Sequence& s) {
  const std::span<const std::int32_t> all(s.tokens);
  return s.score_from ? all.first(std::min(all.size(), static_cast<std::size_t>(*s.score_from) + 1)) : all;
}

}  // namespace

void check(const SchedulerOptions& options) {
  if (options.max_batch_size < 1) {
    throw InvalidArgument(fmt::format("max_batch_size is {}, expected at least 1", options.max_batch_size));
  }
  if (options.max_tokens_per_step < options.max_batch_size) {
    throw InvalidArgument(fmt::format("max_tokens_per_step is {}, expected at least max_batch_size, {}",
                                      options.max_tokens_per_step, options.max_batch_size));
  }
}

Scheduler::Scheduler(const SchedulerOptions& options, kv::PagePool& pool, PrefixLoader* loader)
    : options_(options), pool_(pool), loader_(loader) {
  check(options);
}

void Scheduler::look_up(Sequence& sequence) {
  if (loader_ == nullptr) return;
  const std::span<const std::int32_t> all = reusable(sequence), tokens = all.first(all.size() - 1);
  // Not for what the prefix cache has anyway; but a peer waits to be told.
  if (!sequence.room && std::ssize(tokens) - pool_.cached_prefix(all) < kv::kChunkTokens) return;
  loader_->look_up(sequence, tokens);
}

// Whether the loader may still say something of a sequence that waits.
bool Scheduler::is_awaited(Sequence& sequence) { return loader_ != nullptr && !loader_->found(sequence); }

Sequence* Scheduler::next_to_join() {
  for (Sequence* s : waiting_) {
    if (!is_awaited(*s)) return s;
  }
  return nullptr;
}

void Scheduler::add(Sequence& sequence) {
  sequence.rank = length(sequence) + step_ * options_.max_tokens_per_step;
  waiting_.insert(&sequence);
  look_up(sequence);
}

void Scheduler::fork(const Sequence& parent, Sequence& child) {
  child.tokens = parent.tokens;
  child.rank = parent.rank;
  child.cached_tokens = parent.cached_tokens;
  child.admitted = true;
  child.num_stored = parent.num_stored;
  if (parent.running && num_active() < options_.max_batch_size) {
    child.pages = pool_.fork(parent.pages);
    start(child);
  } else {
    waiting_.insert(&child);
  }
}

StepPlan Scheduler::plan() {
  ++step_;
  StepPlan plan;
  take_loaded();
  for (Sequence* s : running_) s->scheduled = false;
  plan_decoding(plan);
  plan_prefill(plan);
  plan_drafts(plan);
  return plan;
}

std::optional<StepPlan> Scheduler::plan_ahead(std::span<Sequence* const> continuing) {
  if (std::ranges::any_of(loading_, [&](const Sequence* s) { return loader_->has_loaded(*s); }))
    return std::nullopt;
  if (num_active() < options_.max_batch_size) {
    const Sequence* next = next_to_join();
    if (next != nullptr && fits(*next)) return std::nullopt;
  }
  StepPlan plan;
  for (Sequence* s : continuing) {
    // Pages that were taken when a later one finds none stay reserved for the sequence.
    if (!pool_.reserve(s->pages, length(*s) + 1, plan.copies)) return std::nullopt;
    plan.work.push_back({s, length(*s), 1, /*decoding=*/true, /*samples=*/true, {}});
    ++plan.num_tokens;
  }
  // The last plan has made the place where they write their own, and nobody forks before it is committed.
  if (!plan.copies.empty())
    throw std::logic_error("plan_ahead: a sequence shares the page that it writes to");
  ++step_;
  return plan;
}

void Scheduler::plan_decoding(StepPlan& plan) {
  // Earliest first; victims come from the end, so what has been scheduled stays scheduled. By index: running_
  // shrinks under preemption.
  for (std::size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    if (s.num_remaining() != 1) continue;
    if (reserve(s, length(s), plan)) {
      schedule(s, 1, plan);
    } else if (!loading_.empty() || (loader_ != nullptr && loader_->holds_pages())) {
      loader_->hurry();  // it sits this step out: pages come back on their own
    } else {
      preempt(s, plan);  // nothing is running behind it
    }
  }
}

void Scheduler::plan_prefill(StepPlan& plan) {
  std::vector<Sequence*> candidates;
  for (Sequence* s : running_) {
    if (!s->scheduled) candidates.push_back(s);
  }
  // A victim of this very step would only take its pages back.
  bool joining = plan.preempted.empty();
  if (joining) {
    // No more can join than the batch has room for, however many wait.
    int room = options_.max_batch_size - num_active();
    for (auto it = waiting_.begin(); it != waiting_.end() && room > 0; ++it) {
      if (is_awaited(**it)) continue;
      candidates.push_back(*it);
      --room;
    }
  }
  std::sort(candidates.begin(), candidates.end(), ByRank());
  for (Sequence* s : candidates) {
    const int budget = options_.max_tokens_per_step - plan.num_tokens;
    if (budget == 0) break;
    if (!s->running) {
      joining = joining && plan.preempted.empty() && try_to_join(*s);
      if (!joining || s->loading) continue;
    }
    auto count = static_cast<int>(std::min<std::int64_t>(s->num_remaining(), budget));
    if (s->score_from) count = std::min(count, options_.max_scored_tokens - plan.num_scored);
    if (count == 0) continue;
    if (s->running && reserve(*s, s->num_computed() + count, plan)) schedule(*s, count, plan);
  }
}

void Scheduler::plan_drafts(StepPlan& plan) {
  int left = std::min(options_.max_drafts, options_.max_tokens_per_step - plan.num_tokens);
  for (ScheduledWork& work : plan.work) {
    Sequence& s = *work.sequence;
    if (!work.decoding || !work.samples || s.drafts.empty()) continue;
    std::int64_t count = std::min<std::int64_t>(std::ssize(s.drafts), left);
    // Most drafts are wrong: no cached page goes for one.
    if (pool_.pages_needed(s.pages, length(s) + count) > pool_.num_free()) {
      count = std::min(count, std::ssize(s.pages.pages()) * kPageSize - length(s));
    }
    if (count <= 0 || !pool_.reserve(s.pages, length(s) + count, plan.copies)) continue;
    work.drafts.assign(s.drafts.begin(), s.drafts.begin() + count);
    left -= static_cast<int>(count);
    plan.num_tokens += static_cast<int>(count);
  }
}

// Makes room for the sequence's tokens, at the cost of later arrivals that are not in the plan yet.
bool Scheduler::reserve(Sequence& sequence, std::int64_t num_tokens, StepPlan& plan) {
  while (!pool_.reserve(sequence.pages, num_tokens, plan.copies)) {
    const auto victim = std::find_if(running_.rbegin(), running_.rend(), [&](const Sequence* s) {
      return s->order > sequence.order && !s->scheduled;
    });
    if (victim == running_.rend()) return false;
    preempt(**victim, plan);
  }
  return true;
}

// Pages that running prompts still need, and one for each running sequence to grow into.
std::int64_t Scheduler::promised_pages() const {
  std::int64_t promised = 0;
  for (const auto& active : {std::cref(running_), std::cref(loading_)}) {
    for (const Sequence* s : active.get()) promised += 1 + pool_.pages_needed(s->pages, length(*s));
  }
  return promised;
}

bool Scheduler::fits(const Sequence& sequence) const {
  return pool_.admission_cost(reusable(sequence), length(sequence)) + promised_pages() <=
         pool_.num_available();
}

RankLoad Scheduler::backlog() const {
  RankLoad out;
  out.pages = pool_.num_available() - promised_pages();
  const auto add = [&](const Sequence& s) {
    out.tokens += s.num_remaining();
    ++out.sequences;
  };
  for (const Sequence* s : running_) add(*s);
  for (const Sequence* s : loading_) add(*s);
  for (const Sequence* s : waiting_) {
    add(*s);
    out.pages -= 1 + (length(*s) + kPageSize - 1) / kPageSize;
  }
  return out;
}

bool Scheduler::try_to_join(Sequence& sequence) {
  if (!fits(sequence)) return false;
  const std::int64_t hit = pool_.admit(sequence.pages, reusable(sequence));
  if (!sequence.admitted) {
    sequence.admitted = true;
    sequence.cached_tokens = hit;
    counters_.tokens_looked_up += length(sequence);
    counters_.tokens_hit += hit;
  }
  // What the prefix cache has was offered to the tiers when it came there.
  sequence.num_stored = std::max(sequence.num_stored, hit / kv::kChunkTokens * kv::kChunkTokens);
  waiting_.erase(&sequence);
  load(sequence);
  if (!sequence.loading) start(sequence);
  return true;
}

// Begins to load what the loader has beyond the sequence's pages.
void Scheduler::load(Sequence& sequence) {
  if (loader_ == nullptr) return;
  const std::int64_t end = loader_->found(sequence).value_or(0);
  std::vector<kv::PageCopy> none;  // pages behind full ones are new
  if (end <= sequence.num_computed() || !pool_.reserve(sequence.pages, end, none)) {
    loader_->skip(sequence);
    return;
  }
  loader_->load(sequence, end);
  sequence.loading = true;
  loading_.push_back(&sequence);
}

// Those whose pages are there begin to run.
void Scheduler::take_loaded() {
  std::vector<Sequence*> still;
  for (Sequence* s : std::exchange(loading_, {})) {
    const std::optional<std::int64_t> loaded = loader_->loaded(*s);
    if (!loaded) {
      still.push_back(s);
      continue;
    }
    s->loading = false;
    if (s->pages.pages().empty()) {  // given up
      waiting_.insert(s);
      continue;
    }
    const std::int64_t before = s->num_computed();
    pool_.commit(s->pages, std::span(s->tokens).first(static_cast<std::size_t>(*loaded)));
    pool_.trim(s->pages);
    if (s->preemptions == 0) s->cached_tokens += *loaded - before;
    start(*s);
  }
  loading_ = std::move(still);
}

void Scheduler::schedule(Sequence& s, int count, StepPlan& plan) {
  s.scheduled = true;
  ScheduledWork work;
  work.sequence = &s;
  work.begin = s.num_computed();
  work.count = count;
  work.decoding = count == 1 && work.begin > 0;
  work.samples = work.begin + count == length(s);
  plan.work.push_back(work);
  plan.num_tokens += count;
  if (s.score_from) plan.num_scored += count;
}

void Scheduler::commit(const ScheduledWork& work) {
  Sequence& s = *work.sequence;
  pool_.commit(s.pages, std::span(s.tokens).first(static_cast<std::size_t>(work.begin) +
                                                  static_cast<std::size_t>(work.count)));
}

void Scheduler::commit_draft(Sequence& sequence) {
  pool_.commit(sequence.pages,
               std::span(sequence.tokens).first(static_cast<std::size_t>(sequence.num_computed()) + 1));
}

void Scheduler::drop_drafts(Sequence& sequence) { pool_.trim(sequence.pages); }

void Scheduler::preempt(Sequence& sequence, StepPlan& plan) {
  stop(sequence);
  pool_.release(sequence.pages);
  sequence.drafts.clear();
  ++sequence.preemptions;
  ++counters_.preemptions;
  waiting_.insert(&sequence);
  look_up(sequence);
  plan.preempted.push_back(&sequence);
}

void Scheduler::finish(Sequence& sequence, bool keep) {
  if (loader_ != nullptr) loader_->forget(sequence);
  if (sequence.loading) {
    sequence.loading = false;
    std::erase(loading_, &sequence);
  } else if (sequence.running) {
    stop(sequence);
  } else {
    waiting_.erase(&sequence);
  }
  pool_.release(sequence.pages, keep);
}

void Scheduler::start(Sequence& sequence) {
  sequence.running = true;
  sequence.scheduled = false;
  const auto place =
      std::upper_bound(running_.begin(), running_.end(), &sequence,
                       [](const Sequence* a, const Sequence* b) { return a->order < b->order; });
  running_.insert(place, &sequence);
}

void Scheduler::stop(Sequence& sequence) {
  sequence.running = false;
  running_.erase(std::find(running_.begin(), running_.end(), &sequence));
}

}  // namespace flash_mla::engine
