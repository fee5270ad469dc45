#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

struct Job : Sequence {
  int wanted = 1;  // tokens to generate
  int generated = 0;
  std::int64_t arrived = 0, first_token = -1, finished = -1;  // steps
};

// Runs a scheduler as an engine would, with tokens that nobody reads, and checks every plan.
class Simulation {
 public:
  Simulation(int num_pages, int max_batch_size, int max_tokens_per_step, bool prefix_cache = true)
      : options_{max_batch_size, max_tokens_per_step},
        pool(num_pages, prefix_cache),
        scheduler(options_, pool) {}

  Job& add(int prompt, int wanted, std::int32_t first_token = -1) {
    Job& job = *jobs_.emplace_back(std::make_unique<Job>());
    job.order = jobs_.size() * 1024;
    for (int i = 0; i < prompt; ++i) {
      job.tokens.push_back(first_token >= 0 ? first_token + i : static_cast<std::int32_t>(random_()));
    }
    job.wanted = wanted;
    job.arrived = step_;
    scheduler.add(job);
    ++unfinished_;
    return job;
  }

  StepPlan step() {
    ++step_;
    StepPlan plan = scheduler.plan();
    check(plan);
    for (const ScheduledWork& w : plan.work) {
      scheduler.commit(w);
      if (!w.samples) continue;
      Job& job = static_cast<Job&>(*w.sequence);
      if (job.first_token < 0) job.first_token = step_;
      job.tokens.push_back(static_cast<std::int32_t>(random_()));
      if (++job.generated == job.wanted) finish(job);
    }
    pool.check();
    return plan;
  }

  /// As step(), but wherever possible the next step has been planned before this one is committed. Some of
  /// its sequences have ended by then (`ends` says when a token is the last).
  template <class Ends>
  void step_ahead(const Ends& ends) {
    ++step_;
    StepPlan plan;
    if (ahead_) {
      plan = std::move(*ahead_);
      ++num_ahead_;
    } else {
      plan = scheduler.plan();
      check(plan);
    }
    ahead_.reset();
    std::vector<Sequence*> continuing;
    bool all_sample = true;
    int alive = 0;
    for (const ScheduledWork& w : plan.work) {
      const Job& job = static_cast<Job&>(*w.sequence);
      if (job.finished >= 0) continue;
      ++alive;
      all_sample = all_sample && w.samples;
      if (job.generated + 1 < job.wanted) continuing.push_back(w.sequence);
    }
    if (all_sample && alive == scheduler.num_running() && !continuing.empty()) {
      ahead_ = scheduler.plan_ahead(continuing);
    }
    if (ahead_) {
      EXPECT_EQ(sequences(*ahead_), continuing);
      for (const ScheduledWork& w : ahead_->work) {
        EXPECT_EQ(w.begin, static_cast<std::int64_t>(w.sequence->tokens.size()));
        EXPECT_GT(static_cast<std::int64_t>(w.sequence->pages.pages().size()) * kPageSize, w.begin);
        const std::int32_t page = w.sequence->pages.pages()[static_cast<std::size_t>(w.begin / kPageSize)];
        EXPECT_EQ(pool.num_references(page), 1) << "writes to a page that others read";
      }
    }
    for (const ScheduledWork& w : plan.work) {
      Job& job = static_cast<Job&>(*w.sequence);
      if (job.finished >= 0) continue;
      scheduler.commit(w);
      if (!w.samples) continue;
      job.tokens.push_back(static_cast<std::int32_t>(random_()));
      if (++job.generated == job.wanted || ends()) finish(job);
    }
    if (ahead_ && std::ranges::all_of(ahead_->work, [](const ScheduledWork& w) {
          return static_cast<Job*>(w.sequence)->finished >= 0;
        })) {
      ahead_.reset();
    }
    pool.check();
  }
  int unfinished() const { return unfinished_; }
  int num_ahead() const { return num_ahead_; }

  static std::vector<Sequence*> sequences(const StepPlan& plan) {
    std::vector<Sequence*> all;
    for (const ScheduledWork& w : plan.work) all.push_back(w.sequence);
    return all;
  }

  void finish(Job& job) {
    job.finished = step_;
    scheduler.finish(job);
    --unfinished_;
  }

  void run(int most_steps) {
    for (int i = 0; i < most_steps && unfinished_ > 0; ++i) step();
    EXPECT_EQ(unfinished_, 0) << "not finished after " << most_steps << " steps";
    EXPECT_TRUE(scheduler.idle());
    EXPECT_EQ(pool.num_used(), 0) << "leaked pages";
  }

  std::int64_t now() const { return step_; }

 private:
  void check(const StepPlan& plan) {
    int tokens = 0;
    std::set<const Sequence*> seen;
    for (const ScheduledWork& w : plan.work) {
      tokens += w.count;
      EXPECT_TRUE(seen.insert(w.sequence).second) << "twice in a step";
      EXPECT_TRUE(w.sequence->running);
      EXPECT_EQ(w.begin, w.sequence->num_computed());
      EXPECT_GE(w.count, 1);
      const auto end = w.begin + w.count, length = static_cast<std::int64_t>(w.sequence->tokens.size());
      EXPECT_LE(end, length);
      EXPECT_EQ(w.samples, end == length);
      EXPECT_GE(static_cast<std::int64_t>(w.sequence->pages.pages().size()) * kPageSize, end);
    }
    EXPECT_EQ(tokens, plan.num_tokens);
    EXPECT_LE(tokens, options_.max_tokens_per_step);
    EXPECT_LE(scheduler.num_running(), options_.max_batch_size);
    EXPECT_FALSE(plan.work.empty() && unfinished_ > 0) << "a step without progress";
    for (const Sequence* s : plan.preempted) EXPECT_FALSE(s->running);
    // Whoever is past its prompt takes part in every step.
    for (const Sequence* s : scheduler.running()) {
      EXPECT_TRUE(s->num_remaining() != 1 || seen.contains(s)) << "a continuation stands still";
    }
  }

  SchedulerOptions options_;
  std::mt19937 random_{7};
  std::vector<std::unique_ptr<Job>> jobs_;
  std::int64_t step_ = 0;
  int unfinished_ = 0, num_ahead_ = 0;
  std::optional<StepPlan> ahead_;

 public:
  kv::PagePool pool;
  Scheduler scheduler;
};

std::vector<Sequence*> sequences(const StepPlan& plan) { return Simulation::sequences(plan); }

TEST(Scheduler, RefusesBadOptions) {
  kv::PagePool pool(4);
  EXPECT_THROW(Scheduler({0, 100}, pool), InvalidArgument);
  EXPECT_THROW(Scheduler({8, 7}, pool), InvalidArgument);
  EXPECT_NO_THROW(Scheduler({8, 8}, pool));
}

TEST(Scheduler, RequestsJoinAndLeaveAtEveryStep) {
  Simulation sim(100, 2, 100);
  Job& a = sim.add(10, 3);
  EXPECT_EQ(sequences(sim.step()), (std::vector<Sequence*>{&a}));
  Job& b = sim.add(10, 3);
  Job& c = sim.add(12, 1);
  EXPECT_EQ(sequences(sim.step()), (std::vector<Sequence*>{&a, &b})) << "the batch has room for two";
  EXPECT_EQ(sequences(sim.step()), (std::vector<Sequence*>{&a, &b}));
  EXPECT_EQ(a.finished, 3);
  EXPECT_EQ(sequences(sim.step()), (std::vector<Sequence*>{&b, &c}));
  sim.run(1);
}

TEST(Scheduler, LongPromptsAreChunkedBesideRunningSequences) {
  Simulation sim(100, 8, 64);
  Job& a = sim.add(10, 100);
  sim.step();
  Job& b = sim.add(200, 1);
  for (int i = 0; i < 4; ++i) {
    const StepPlan plan = sim.step();
    ASSERT_EQ(plan.work.size(), 2u);
    EXPECT_EQ(plan.work[0].sequence, &a);
    EXPECT_EQ(plan.work[1].sequence, &b);
    EXPECT_EQ(plan.work[1].count, i < 3 ? 63 : 200 - 3 * 63);
    EXPECT_EQ(plan.work[1].samples, i == 3);
  }
  sim.run(100);
}

TEST(Scheduler, OfRequestsThatArriveTogetherTheShortestGoesFirst) {
  Simulation sim(100, 8, 64);
  Job& a = sim.add(300, 1);
  Job& b = sim.add(20, 1);
  Job& c = sim.add(100, 1);
  sim.run(20);
  EXPECT_LT(b.first_token, c.first_token);
  EXPECT_LT(c.first_token, a.first_token);
}

TEST(Scheduler, AgeingBoundsHowOftenALongPromptIsOvertaken) {
  Simulation sim(200, 8, 64);
  Job& longest = sim.add(640, 1);
  // Enough short prompts to fill every step for ever.
  for (int i = 0; i < 200 && longest.finished < 0; ++i) {
    sim.add(32, 1);
    sim.add(32, 1);
    sim.step();
  }
  ASSERT_GT(longest.finished, 0) << "starved";
  // Overtaken for the 10 steps its prompt takes, then 10 steps of its own.
  EXPECT_GE(longest.finished, 15);
  EXPECT_LE(longest.finished, 25);
  sim.run(2000);
}

TEST(Scheduler, NobodyJoinsPastAPromptThatWaitsForPages) {
  Simulation sim(10, 8, 640);
  Job& a = sim.add(64 * 6, 40);
  sim.step();
  Job& b = sim.add(64 * 6, 1);  // does not fit beside a
  for (int i = 0; i < 5; ++i) sim.step();
  Job& c = sim.add(640, 1);  // later, longer
  Job& d = sim.add(10, 1);   // would fit; arrived so late that it ranks behind b
  for (int i = 0; i < 10; ++i) sim.step();
  EXPECT_EQ(d.first_token, -1);
  sim.run(200);
  EXPECT_LE(a.finished, b.first_token);
  EXPECT_LE(b.first_token, d.first_token);
  EXPECT_LT(d.first_token, c.first_token);
}

TEST(Scheduler, TheLatestArrivalIsPreempted) {
  Simulation sim(8, 8, 512);
  Job& a = sim.add(100, 300);
  Job& b = sim.add(100, 300);
  Job& c = sim.add(60, 200);
  std::vector<Sequence*> victims;
  for (int i = 0; i < 2000 && (a.finished < 0 || b.finished < 0 || c.finished < 0); ++i) {
    for (Sequence* s : sim.step().preempted) victims.push_back(s);
  }
  ASSERT_FALSE(victims.empty());
  EXPECT_EQ(victims.front(), &c);
  EXPECT_EQ(a.preemptions, 0) << "the earliest arrival is never preempted";
  EXPECT_LT(a.finished, b.finished);
  EXPECT_EQ(sim.scheduler.counters().preemptions, static_cast<std::int64_t>(victims.size()));
  sim.run(1);
}

TEST(Scheduler, PrefixHitsShortenThePrompt) {
  Simulation sim(20, 8, 512);
  sim.add(200, 1, /*first_token=*/0);
  sim.step();
  Job& b = sim.add(200, 1, 0);
  const StepPlan plan = sim.step();
  ASSERT_EQ(plan.work.size(), 1u);
  EXPECT_EQ(plan.work[0].begin, 192);
  EXPECT_EQ(plan.work[0].count, 8);
  EXPECT_EQ(b.cached_tokens, 192);
  EXPECT_EQ(sim.scheduler.counters().tokens_hit, 192);
  EXPECT_EQ(sim.scheduler.counters().tokens_looked_up, 400);
}

TEST(Scheduler, ForksShareOrWait) {
  Simulation sim(20, 2, 512);
  Job& a = sim.add(100, 5);
  const StepPlan plan = sim.scheduler.plan();
  sim.scheduler.commit(plan.work[0]);
  Job b, c;
  b.order = a.order + 1;
  c.order = a.order + 2;
  sim.scheduler.fork(a, b);
  sim.scheduler.fork(a, c);
  EXPECT_TRUE(b.running);
  EXPECT_EQ(b.pages.pages()[1], a.pages.pages()[1]);
  EXPECT_FALSE(c.running) << "the batch is full";
  EXPECT_EQ(sim.scheduler.num_waiting(), 1);
  for (Job* job : {&a, &b, &c}) job->tokens.push_back(1);
  const StepPlan next = sim.scheduler.plan();
  EXPECT_EQ(sequences(next), (std::vector<Sequence*>{&a, &b}));
  EXPECT_EQ(next.copies.size(), 1u);
  for (const ScheduledWork& w : next.work) sim.scheduler.commit(w);
  for (Job* job : {&a, &b}) sim.scheduler.finish(*job);
  const StepPlan last = sim.scheduler.plan();
  ASSERT_EQ(sequences(last), (std::vector<Sequence*>{&c}));
  EXPECT_EQ(last.work[0].begin, 64) << "the shared prefix is in the cache";
  sim.scheduler.finish(c);
  EXPECT_EQ(sim.pool.num_used(), 0);
}

TEST(Scheduler, PlansAheadWhereNobodyElseCanCome) {
  Simulation sim(6, 2, 512);
  Job& a = sim.add(64, 100);
  sim.step();
  ASSERT_EQ(sequences(sim.scheduler.plan()), (std::vector<Sequence*>{&a}));
  Sequence* const continuing[] = {&a};
  const std::optional<StepPlan> ahead = sim.scheduler.plan_ahead(continuing);
  ASSERT_TRUE(ahead);
  ASSERT_EQ(ahead->work.size(), 1u);
  EXPECT_EQ(ahead->work[0].begin, 65);
  EXPECT_EQ(ahead->work[0].count, 1);
  Job& b = sim.add(64, 1);
  EXPECT_FALSE(sim.scheduler.plan_ahead(continuing)) << "b can join";
  sim.finish(b);
  sim.add(6 * 64 - 1, 1);
  EXPECT_TRUE(sim.scheduler.plan_ahead(continuing)) << "this one cannot: a has the pages that it needs";
}

TEST(Scheduler, RandomLoadsPlannedAheadFinishWithoutLeaks) {
  int ahead = 0;
  for (unsigned seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    const int pages = 8 + below(30), batch = 1 + below(12);
    Simulation sim(pages, batch, batch + below(300), below(3) != 0);
    const auto ends = [&] { return below(20) == 0; };
    std::vector<Job*> jobs;
    for (int i = 0; i < 60; ++i) {
      const int longest = pages * kPageSize;
      const int prompt = 1 + below(below(4) == 0 ? longest - 1 : 150);
      jobs.push_back(
          &sim.add(prompt, 1 + below(std::min(100, longest - prompt)), below(2) == 0 ? below(3) * 1000 : -1));
      for (int k = below(6); k > 0; --k) sim.step_ahead(ends);
      Job* cancelled = jobs[static_cast<std::size_t>(below(static_cast<int>(jobs.size())))];
      if (below(10) == 0 && cancelled->finished < 0) sim.finish(*cancelled);
    }
    for (int i = 0; i < 100000 && sim.unfinished() > 0; ++i) sim.step_ahead(ends);
    EXPECT_EQ(sim.unfinished(), 0);
    EXPECT_TRUE(sim.scheduler.idle());
    EXPECT_EQ(sim.pool.num_used(), 0) << "leaked pages";
    ahead += sim.num_ahead();
    if (HasFailure()) return;
  }
  EXPECT_GT(ahead, 1000);
}

TEST(Scheduler, RandomLoadsFinishWithoutLeaks) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    const int pages = 8 + below(30), batch = 1 + below(12);
    Simulation sim(pages, batch, batch + below(300), below(3) != 0);
    std::vector<Job*> jobs;
    std::int64_t work = 0;
    for (int i = 0; i < 60; ++i) {
      const int longest = pages * kPageSize;
      const int prompt = 1 + below(below(4) == 0 ? longest - 1 : 150);
      const int wanted = 1 + below(std::min(100, longest - prompt));
      // The last generated token never needs a place in the cache.
      jobs.push_back(&sim.add(prompt, wanted, below(2) == 0 ? below(3) * 1000 : -1));
      work += prompt + wanted;
      for (int k = below(6); k > 0; --k) sim.step();
      Job* cancelled = jobs[static_cast<std::size_t>(below(static_cast<int>(jobs.size())))];
      if (below(10) == 0 && cancelled->finished < 0) sim.finish(*cancelled);
    }
    sim.run(static_cast<int>(work) * 4);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace flash_mla::engine
