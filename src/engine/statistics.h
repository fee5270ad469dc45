#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "engine/request.h"

namespace flash_mla::engine {

struct LaunchedStep;

/// Counts what EngineStats and the timeline show. From any thread.
class Statistics {
 public:
  Statistics();
  /// The next one; `ranks` are those of its model. Before anything is counted.
  void add_rank(int max_batch_size, int num_pages, std::size_t bytes_per_page, double weight_bytes,
                std::vector<RankStats> ranks);

  /// Seconds since the engine was made.
  double seconds(Clock::time_point t) const { return std::chrono::duration<double>(t - created_).count(); }

  /// A request has come into the inbox, where it counts as waiting.
  void submitted(std::int64_t prompt_tokens);
  /// A token of `c` has been chosen and is counted in it.
  void generated(const Continuation& c);
  /// `continuations` of them have ended as `c` has.
  void ended(const Continuation& c, FinishReason reason, std::int64_t continuations);

  /// What came of the drafts of a step.
  void drafted(const LaunchedStep& step);

  /// Where a rank's sequences and pages are, between steps.
  struct Load {
    int running = 0, waiting = 0, pages_used = 0, pages_cached = 0;
  };
  void set_load(int rank, const Load& load);
  /// The same: a request has gone from the inbox there.
  void begun(int rank, const Load& load);
  /// The ranks of its model, after a step.
  void set_ranks(int rank, std::vector<RankStats> ranks);
  /// A rank has done its part of a step; gives its record the step's number. `utilisation` 0: nothing decoded in it.
  void step_ended(int rank, StepRecord record, double utilisation, const Scheduler::Counters& scheduled,
                  const kv::PagePool::Counters& pages);
  /// All have.
  void step_ended();

  EngineStats snapshot() const;
  EngineLoad load() const;
  std::vector<EngineLoad> rank_loads() const;
  std::vector<StepRecord> timeline() const;

 private:
  const Clock::time_point created_ = Clock::now();
  mutable std::mutex mutex_;  // of what follows
  struct Rank {
    int pages_total = 0;
    Load load;
    std::int64_t computed_tokens = 0;
    Scheduler::Counters scheduled;
    kv::PagePool::Counters pages;
    std::vector<RankStats> ranks;
    EngineLoad whole_load() const;
  };

  int in_inbox_ = 0;
  EngineStats stats_;
  std::vector<Rank> ranks_;
  bool stepped_ = false;  // some rank has done its part of a step
  double step_begin_ = 0, step_end_ = 0;
  std::deque<StepRecord> timeline_;
};

}  // namespace flash_mla::engine
