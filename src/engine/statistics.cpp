#include "engine/statistics.h"

#include <algorithm>
#include <utility>

#include "engine/step_pipeline.h"

namespace flash_mla::engine {
namespace {

constexpr std::size_t kTimelineSteps = 4096;

std::vector<double> latency_bounds() {
  return {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100};
}

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

Statistics::Statistics() {
  for (Histogram* h : {&stats_.ttft_seconds, &stats_.tpot_seconds, &stats_.e2e_seconds}) {
    h->bounds = latency_bounds();
    h->counts.resize(h->bounds.size() + 1);
  }
}

void Statistics::add_rank(int max_batch_size, int num_pages, std::size_t bytes_per_page, double weight_bytes,
                          std::vector<RankStats> ranks) {
  const std::lock_guard lock(mutex_);
  stats_.max_batch_size += max_batch_size;
  stats_.pages_total += num_pages;
  stats_.bytes_per_page = bytes_per_page;
  stats_.weight_bytes += weight_bytes;
  Rank& rank = ranks_.emplace_back();
  rank.pages_total = num_pages;
  rank.ranks = std::move(ranks);
}

void Statistics::submitted(std::int64_t prompt_tokens) {
  const std::lock_guard lock(mutex_);
  ++in_inbox_;
  ++stats_.requests_submitted;
  stats_.prompt_tokens += prompt_tokens;
}

void Statistics::generated(const Continuation& c) {
  const std::lock_guard lock(mutex_);
  ++stats_.generated_tokens;
  if (c.num_generated == 1) stats_.ttft_seconds.add(seconds_between(c.request->submitted, c.first_token));
}

void Statistics::ended(const Continuation& c, FinishReason reason, std::int64_t continuations) {
  const std::lock_guard lock(mutex_);
  switch (reason) {
    case FinishReason::kStop:
      stats_.finished_stop += continuations;
      break;
    case FinishReason::kLength:
      stats_.finished_length += continuations;
      break;
    case FinishReason::kCancelled:
      stats_.cancelled += continuations;
      break;
    default:
      stats_.failed += continuations;
  }
  if (reason != FinishReason::kStop && reason != FinishReason::kLength) return;
  stats_.e2e_seconds.add(seconds_between(c.request->submitted, c.last_token));
  if (c.num_generated > 1) {
    stats_.tpot_seconds.add(seconds_between(c.first_token, c.last_token) /
                            static_cast<double>(c.num_generated - 1));
  }
}

void Statistics::drafted(const LaunchedStep& step) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    const int drafts = step.plan.work[i].num_drafts();
    if (drafts == 0 || step.drafts[i].tokens == 0) continue;
    const bool by_module = step.continuation(i).draft_source == DraftSource::kMtp;
    DraftStats& to = by_module ? stats_.mtp_drafts : stats_.ngram_drafts;
    ++to.steps;
    to.drafted += drafts;
    to.accepted += step.drafts[i].accepted;
    to.tokens += step.drafts[i].tokens;
  }
}

void Statistics::set_load(int rank, const Load& load) {
  const std::lock_guard lock(mutex_);
  ranks_[static_cast<std::size_t>(rank)].load = load;
}

void Statistics::begun(int rank, const Load& load) {
  const std::lock_guard lock(mutex_);
  --in_inbox_;
  ranks_[static_cast<std::size_t>(rank)].load = load;
}

void Statistics::set_ranks(int rank, std::vector<RankStats> ranks) {
  const std::lock_guard lock(mutex_);
  ranks_[static_cast<std::size_t>(rank)].ranks = std::move(ranks);
}

void Statistics::step_ended(int rank, StepRecord record, double utilisation,
                            const Scheduler::Counters& scheduled, const kv::PagePool::Counters& pages) {
  const std::lock_guard lock(mutex_);
  record.step = stats_.steps;
  record.rank = rank;
  step_begin_ = stepped_ ? std::min(step_begin_, record.begin) : record.begin;
  step_end_ = stepped_ ? std::max(step_end_, record.end) : record.end;
  stepped_ = true;
  Rank& of = ranks_[static_cast<std::size_t>(rank)];
  of.computed_tokens += record.decode_tokens + record.prefill_tokens;
  of.scheduled = scheduled;
  of.pages = pages;
  if (utilisation > 0) stats_.schedule_utilisation = utilisation;
  timeline_.push_back(std::move(record));
  if (timeline_.size() > kTimelineSteps) timeline_.pop_front();
}

void Statistics::step_ended() {
  const std::lock_guard lock(mutex_);
  if (!std::exchange(stepped_, false)) return;
  ++stats_.steps;
  stats_.step_seconds += step_end_ - step_begin_;
}

EngineStats Statistics::snapshot() const {
  const std::lock_guard lock(mutex_);
  EngineStats out = stats_;
  out.waiting = in_inbox_;
  for (const Rank& rank : ranks_) {
    out.running += rank.load.running;
    out.waiting += rank.load.waiting;
    out.pages_used += rank.load.pages_used;
    out.pages_cached += rank.load.pages_cached;
    out.computed_tokens += rank.computed_tokens;
    out.prefix_tokens_looked_up += rank.scheduled.tokens_looked_up;
    out.prefix_tokens_hit += rank.scheduled.tokens_hit;
    out.preemptions += rank.scheduled.preemptions;
    out.pages_evicted += rank.pages.pages_evicted;
    out.pages_copied += rank.pages.pages_copied;
    const std::size_t first = out.ranks.size();
    out.ranks.insert(out.ranks.end(), rank.ranks.begin(), rank.ranks.end());
    if (ranks_.size() == 1) break;
    if (rank.ranks.empty()) out.ranks.emplace_back();  // its model counts nothing
    RankStats& of = out.ranks[first];
    of.running = rank.load.running;
    of.waiting = rank.load.waiting;
    of.pages_total = rank.pages_total;
    of.pages_used = rank.load.pages_used;
    of.pages_cached = rank.load.pages_cached;
    of.computed_tokens = rank.computed_tokens;
    of.prefix_tokens_hit = rank.scheduled.tokens_hit;
    of.preemptions = rank.scheduled.preemptions;
  }
  out.seconds = seconds(Clock::now());
  return out;
}

EngineLoad Statistics::Rank::whole_load() const {
  return {load.running,        load.waiting, load.pages_used,
          load.pages_cached,   pages_total,  scheduled.tokens_looked_up,
          scheduled.tokens_hit};
}

std::vector<EngineLoad> Statistics::rank_loads() const {
  const std::lock_guard lock(mutex_);
  std::vector<EngineLoad> out;
  out.reserve(ranks_.size());
  for (const Rank& rank : ranks_) out.push_back(rank.whole_load());
  return out;
}

EngineLoad Statistics::load() const {
  const std::lock_guard lock(mutex_);
  EngineLoad out;
  out.waiting = in_inbox_;
  for (const Rank& of : ranks_) {
    const EngineLoad rank = of.whole_load();
    out.running += rank.running;
    out.waiting += rank.waiting;
    out.pages_used += rank.pages_used;
    out.pages_cached += rank.pages_cached;
    out.pages_total += rank.pages_total;
    out.prefix_tokens_looked_up += rank.prefix_tokens_looked_up;
    out.prefix_tokens_hit += rank.prefix_tokens_hit;
  }
  return out;
}

std::vector<StepRecord> Statistics::timeline() const {
  const std::lock_guard lock(mutex_);
  return {timeline_.begin(), timeline_.end()};
}

}  // namespace flash_mla::engine
