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
  Statistics(int max_batch_size, int num_pages, std::size_t bytes_per_page);

  /// Seconds since the engine was made.
  double seconds(Clock::time_point t) const { return std::chrono::duration<double>(t - created_).count(); }

  /// A request has come into the inbox, where it counts as waiting.
  void submitted(std::int64_t prompt_tokens);
  /// Requests have left the inbox. They count as waiting until set_load() says where they went.
  void taken(int requests);
  /// A token of `c` has been chosen and is counted in it.
  void generated(const Continuation& c);
  /// `continuations` of them have ended as `c` has.
  void ended(const Continuation& c, FinishReason reason, std::int64_t continuations);

  /// What came of the drafts of a step.
  void drafted(const LaunchedStep& step);

  /// Where sequences and pages are, between steps.
  struct Load {
    int running = 0, waiting = 0, pages_used = 0, pages_cached = 0;
  };
  void set_load(const Load& load);
  /// A step is over; gives its record its number. `utilisation` 0: nothing decoded in it.
  void step_ended(StepRecord record, double utilisation, const Scheduler::Counters& scheduled,
                  const kv::PagePool::Counters& pages, std::vector<RankStats> ranks);

  EngineStats snapshot() const;
  std::vector<StepRecord> timeline() const;

 private:
  const Clock::time_point created_ = Clock::now();
  mutable std::mutex mutex_;  // of what follows
  int in_inbox_ = 0;
  EngineStats stats_;
  std::deque<StepRecord> timeline_;
};

}  // namespace flash_mla::engine
