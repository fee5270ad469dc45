// The engine over ranks that have requests of their own and take every step together: fake models that meet in it, then
// models/small.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "engine/balance.h"
#include "engine/engine_core.h"
#include "flash_mla/error.h"
#include "harness.h"
#include "model/parallel/lock_step.h"
#include "sanitized.h"

namespace flash_mla::engine {
namespace {

// Under a sanitizer every step takes many times as long.
constexpr int kCancelled = unless_sanitized(500, 150), kFailures = unless_sanitized(20, 5),
              kOfAClient = unless_sanitized(40, 15);
constexpr auto kRanks = unless_sanitized(std::array{2, 4}, std::array{3});

std::size_t place(std::vector<RankLoad> loads, const std::vector<std::int64_t>& cached, std::int64_t length) {
  return take_rank(loads, cached, length, 1);
}

TEST(Balance, GoesWhereThePromptIsComputedFirst) {
  const RankLoad idle{0, 0, 100}, busy{1000, 2, 100};
  EXPECT_EQ(place({idle, idle}, {0, 0}, 500), 0u);
  EXPECT_EQ(place({busy, idle}, {0, 0}, 500), 1u);
  EXPECT_EQ(place({idle, idle}, {0, 448}, 500), 1u) << "a cached prefix";
  EXPECT_EQ(place({busy, idle}, {448, 0}, 500), 1u) << "the prefix is not worth the queue";
  EXPECT_EQ(place({{100, 1, 100}, idle}, {448, 0}, 500), 0u) << "here it is";
  EXPECT_EQ(place({{20, 20, 100}, idle}, {448, 0}, 500), 1u) << "nor is it worth twenty sequences";
  EXPECT_EQ(place({{0, 0, 3}, busy}, {0, 0}, 500), 1u) << "its cache has no room";
  EXPECT_EQ(place({{0, 0, 3}, {1000, 2, -5}}, {0, 0}, 500), 0u) << "nobody's has";
}

TEST(Balance, CountsWhatItHasPlaced) {
  std::vector<RankLoad> loads(3, RankLoad{0, 0, 100});
  const std::vector<std::int64_t> none(3, 0);
  for (const std::size_t expected : {0u, 1u, 2u, 0u}) EXPECT_EQ(take_rank(loads, none, 64, 2), expected);
  EXPECT_EQ(loads[0].tokens, 128);
  EXPECT_EQ(loads[0].sequences, 4);
  EXPECT_EQ(loads[1].pages, 97) << "its prompt's, and one for each continuation";
}

/// A fake model whose steps, and the module's applications, are those of all ranks.
class MeetingFake : public FakeModel {
 public:
  MeetingFake(comm::Communicator& communicator, std::function<void(int rank)> on_step)
      : communicator_(communicator), on_step_(std::move(on_step)) {}
  void launch(const model::ForwardBatch& batch) override {
    if (on_step_) on_step_(communicator_.rank());
    meet(steps_++);
    FakeModel::launch(batch);
  }
  void draft(const model::DraftBatch& batch, std::int32_t* tokens) override {
    for (int i = 0; i < batch.num_applications; ++i) meet(-1 - i);
    FakeModel::draft(batch, tokens);
  }

 private:
  // All ranks are at the same thing.
  void meet(std::int64_t number) {
    std::vector<std::int64_t> all(static_cast<std::size_t>(communicator_.size()));
    const auto column = [](std::int64_t* values, std::int64_t rows) {
      return Matrix{reinterpret_cast<std::byte*>(values), DType::kInt64, rows, 1, 1};
    };
    communicator_.all_gather(column(&number, 1), column(all.data(), std::ssize(all)));
    if (std::ranges::count(all, number) != std::ssize(all)) throw std::logic_error("ranks have come apart");
  }

  comm::Communicator& communicator_;
  std::function<void(int rank)> on_step_;
  std::int64_t steps_ = 0;
};

class Ranks {
 public:
  explicit Ranks(int dp, const EngineOptions& options = Harness::defaults(),
                 const std::function<void(int)>& on_step = {}, bool has_module = false)
      : core(
            model::LockStepModel::make(dp, false,
                                       [&](int, comm::Communicator& communicator) {
                                         auto out = std::make_unique<MeetingFake>(communicator, on_step);
                                         out->has_module = has_module;
                                         return out;
                                       }),
            [] { return std::make_unique<FakeDecoder>(); }, Tokens{FakeModel::kEos}, options) {}

  RequestId submit(const Tokens& prompt, const SamplingParams& sampling) {
    Request r = request(prompt, sampling);
    core.check(r);
    return core.submit(std::move(r), [this](const GenerationEvent& e) { take(e); });
  }
  void run() {
    for (int i = 0; i < 100000 && core.step(); ++i) {
    }
    expect_empty();
  }
  void expect_empty() const {
    const EngineStats stats = core.stats();
    EXPECT_EQ(stats.running + stats.waiting, 0);
    for (const RankStats& rank : stats.ranks) EXPECT_EQ(rank.pages_used, 0) << "leaked pages";
  }
  void take(const GenerationEvent& e) {
    EXPECT_FALSE(in_handler.exchange(true)) << "two handlers at once";
    Result& r = results[e.request][e.index];
    EXPECT_EQ(r.finish, FinishReason::kNone) << "an event after the end";
    r.tokens.insert(r.tokens.end(), e.token_ids.begin(), e.token_ids.end());
    r.finish = e.finish;
    r.error = e.error;
    r.usage = e.usage;
    ended += e.last;
    in_handler = false;
  }

  std::atomic<bool> in_handler = false;
  std::map<RequestId, std::map<int, Result>> results;
  int ended = 0;
  EngineCore core;
};

TEST(EngineOfRanks, ContinuesAsOneRankDoes) {
  for (const int dp : {1, 2, 4}) {
    SCOPED_TRACE(dp);
    Ranks ranks(dp);
    std::mt19937 random(5);
    std::map<RequestId, Tokens> prompts;
    for (int i = 0; i < 40; ++i) {
      const Tokens prompt = random_prompt(random, 1 + random() % 200);
      prompts[ranks.submit(prompt, greedy(1 + static_cast<int>(random() % 30)))] = prompt;
      if (i % 7 == 0) ranks.core.step();
    }
    ranks.run();
    ASSERT_EQ(ranks.results.size(), 40u);
    for (auto& [id, of] : ranks.results) {
      EXPECT_EQ(of[0].finish, FinishReason::kLength);
      EXPECT_EQ(of[0].tokens, continuation(prompts[id], static_cast<int>(of[0].tokens.size())));
    }
    const EngineStats stats = ranks.core.stats();
    EXPECT_EQ(stats.ranks.size(), static_cast<std::size_t>(dp));
    EXPECT_EQ(stats.requests_submitted, 40);
    EXPECT_EQ(stats.finished_length, 40);
    EXPECT_EQ(stats.pages_total, 64 * dp);
    EXPECT_EQ(stats.max_batch_size, 16 * dp);
    std::int64_t computed = 0;
    for (const RankStats& rank : stats.ranks) {
      if (dp == 1) break;
      EXPECT_GT(rank.computed_tokens, 0) << "everybody has work";
      EXPECT_EQ(rank.pages_total, 64);
      EXPECT_EQ(rank.exchanges, stats.ranks[0].exchanges);
      computed += rank.computed_tokens;
    }
    if (dp > 1) {
      EXPECT_EQ(computed, stats.computed_tokens);
    }
    std::set<int> seen;
    for (const StepRecord& record : ranks.core.timeline()) {
      seen.insert(record.rank);
      EXPECT_LT(record.step, stats.steps);
    }
    EXPECT_EQ(seen.size(), static_cast<std::size_t>(dp));
  }
}

TEST(EngineOfRanks, OneRequestRunsBesideRanksWithoutWork) {
  Ranks ranks(3);
  const Tokens prompt = {5, 6, 7};
  const RequestId id = ranks.submit(prompt, greedy(20));
  ranks.run();
  EXPECT_EQ(ranks.results[id][0].tokens, continuation(prompt, 20));
  const EngineStats stats = ranks.core.stats();
  ASSERT_EQ(stats.ranks.size(), 3u);
  EXPECT_EQ(stats.ranks[0].computed_tokens, 22);
  EXPECT_EQ(stats.ranks[2].computed_tokens, 0);
  EXPECT_EQ(stats.steps, 20);
}

// A prompt that begins as an earlier one goes to the rank that has it, while that one is not busier by more.
TEST(EngineOfRanks, PromptsGoWhereTheirBeginningIs) {
  Ranks ranks(4);
  std::mt19937 random(9);
  std::vector<Tokens> prefixes;
  prefixes.reserve(4);
  for (int i = 0; i < 4; ++i) prefixes.push_back(random_prompt(random, 192));
  for (int round = 0; round < 5; ++round) {
    for (const Tokens& prefix : prefixes) {
      const RequestId id = ranks.submit(random_prompt(random, 200, prefix), greedy(2));
      if (round == 0) continue;
      ranks.run();
      EXPECT_EQ(ranks.results[id][0].usage.cached_tokens, 192);
    }
    ranks.run();
  }
  for (const RankStats& rank : ranks.core.stats().ranks) EXPECT_EQ(rank.prefix_tokens_hit, 4 * 192);
}

TEST(EngineOfRanks, ContinuationsOfARequestStayTogether) {
  Ranks ranks(2);
  SamplingParams p = greedy(10);
  p.n = 3;
  const Tokens prompt = {1, 2, 3, 4};
  const RequestId id = ranks.submit(prompt, p);
  ranks.run();
  ASSERT_EQ(ranks.results[id].size(), 3u);
  for (auto& [index, result] : ranks.results[id]) EXPECT_EQ(result.tokens, continuation(prompt, 10)) << index;
}

// The module is applied equally often on all ranks, whatever each of them drafts.
TEST(EngineOfRanks, DraftsOfTheModuleAreTakenTogether) {
  for (const auto speculative : {EngineOptions::Speculative::kMtp, EngineOptions::Speculative::kAuto}) {
    EngineOptions o = Harness::defaults();
    o.speculative = speculative;
    Ranks ranks(3, o, {}, /*has_module=*/true);
    std::mt19937 random(15);
    std::map<RequestId, Tokens> prompts;
    for (int i = 0; i < 25; ++i) {
      const Tokens prompt = random_prompt(random, 1 + random() % 90);
      prompts[ranks.submit(prompt, greedy(1 + static_cast<int>(random() % 60)))] = prompt;
      for (unsigned steps = random() % 12; steps > 0; --steps) ranks.core.step();
    }
    ranks.run();
    for (auto& [id, of] : ranks.results) {
      EXPECT_EQ(of[0].error, "");
      EXPECT_EQ(of[0].tokens, continuation(prompts[id], static_cast<int>(of[0].tokens.size())));
    }
    EXPECT_GT(ranks.core.stats().mtp_drafts.accepted, 0);
  }
}

TEST(EngineOfRanks, TheQueueIsBoundedOverAllRanks) {
  EngineOptions o = Harness::defaults();
  o.max_waiting = 3;
  Ranks ranks(2, o);
  for (int i = 0; i < 3; ++i) ranks.submit({1, 2}, greedy(3));
  EXPECT_THROW(ranks.submit({1, 2}, greedy(3)), Overloaded);
  ranks.core.step();
  ranks.submit({1, 2}, greedy(3));
  ranks.run();
  EXPECT_EQ(ranks.ended, 4);
}

TEST(EngineOfRanks, FiveHundredRequestsWithRandomCancelsLeaveNoPage) {
  for (const int dp : kRanks) {
    SCOPED_TRACE(dp);
    EngineOptions o = Harness::defaults();
    o.num_pages = 12;  // so few that sequences are preempted
    o.max_batch_size = 8;
    o.max_tokens_per_step = 64;
    Ranks ranks(dp, o);
    std::mt19937 random(21);
    std::vector<RequestId> ids;
    std::map<RequestId, Tokens> prompts;
    const Tokens common = random_prompt(random, 150);
    while (ranks.ended < kCancelled) {
      while (std::ssize(ids) < kCancelled && random() % 3 != 0) {
        const Tokens prompt =
            random_prompt(random, 1 + random() % 250, random() % 2 == 0 ? common : Tokens());
        SamplingParams p = greedy(1 + static_cast<int>(random() % 60));
        p.n = random() % 8 == 0 ? 3 : 1;
        ids.push_back(ranks.submit(prompt, p));
        prompts[ids.back()] = prompt;
      }
      while (!ids.empty() && random() % 3 == 0) {
        const RequestId id = ids[random() % ids.size()];
        random() % 2 == 0 ? ranks.core.cancel(id) : ranks.core.cancel(id, static_cast<int>(random() % 3));
      }
      ranks.core.step();
    }
    ranks.run();
    const EngineStats stats = ranks.core.stats();
    EXPECT_EQ(stats.failed, 0);
    EXPECT_GT(stats.cancelled, 0);
    EXPECT_GT(stats.preemptions, 0);
    EXPECT_GT(stats.prefix_tokens_hit, 0);
    EXPECT_EQ(stats.pages_used, 0);
    ASSERT_EQ(stats.ranks.size(), static_cast<std::size_t>(dp));
    for (const RankStats& rank : stats.ranks) {
      EXPECT_EQ(rank.pages_used, 0);
      EXPECT_EQ(rank.running + rank.waiting, 0);
      EXPECT_GT(rank.computed_tokens, 0);
    }
    for (auto& [id, of] : ranks.results) {
      for (auto& [index, result] : of) {
        const Tokens all = continuation(prompts[id], static_cast<int>(result.tokens.size()));
        EXPECT_EQ(result.tokens, all) << id << ", " << index;
      }
    }
  }
}

TEST(EngineOfRanks, ManyThreadsSubmitAndCancel) {
  EngineOptions o = Harness::defaults();
  o.num_pages = 20;
  Ranks ranks(3, o);
  EngineCore& core = ranks.core;
  std::jthread stepper([&](const std::stop_token& stop) {
    while (core.wait_for_work(stop)) core.step();
  });
  constexpr int kThreads = 3, kRequests = kOfAClient;
  std::atomic<int> ended = 0;
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> clients;
    clients.reserve(kThreads);
    for (int c = 0; c < kThreads; ++c) {
      clients.emplace_back([&, c] {
        std::mt19937 random(static_cast<unsigned>(c));
        for (int i = 0; i < kRequests; ++i) {
          const Tokens prompt = random_prompt(random, 1 + random() % 100);
          auto tokens = std::make_shared<Tokens>();
          const RequestId id =
              core.submit(request(prompt, greedy(1 + static_cast<int>(random() % 40))),
                          [&, tokens, prompt](const GenerationEvent& e) {
                            tokens->insert(tokens->end(), e.token_ids.begin(), e.token_ids.end());
                            if (!e.last) return;
                            wrong += *tokens != continuation(prompt, static_cast<int>(tokens->size()));
                            ++ended;
                          });
          if (random() % 4 == 0) core.cancel(id);
          if (random() % 4 == 0) core.stats();
        }
      });
    }
  }
  for (int i = 0; i < 6000 && ended < kThreads * kRequests; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(ended, kThreads * kRequests);
  EXPECT_EQ(wrong, 0);
  stepper.request_stop();
  stepper.join();
  ranks.expect_empty();
}

// At a random step, twenty times: every request that runs or waits ends with the rank's name and reason, wherever it is.
TEST(EngineOfRanks, EndsWithTheNameOfARankThatFails) {
  std::mt19937 random(2);
  for (int i = 0; i < kFailures; ++i) {
    const int failing = static_cast<int>(random() % 3);
    int left = 1 + static_cast<int>(random() % 12);  // of that rank's steps; its thread alone counts them
    EngineOptions o = Harness::defaults();
    o.max_batch_size = 2;
    std::vector<std::string> told;
    o.on_broken = [&](const std::string& why) { told.push_back(why); };
    Ranks ranks(3, o, [&](int rank) {
      if (rank == failing && --left < 0) throw std::runtime_error("the device is gone");
    });
    const unsigned requests = 1 + random() % 12;
    for (unsigned r = 0; r < requests; ++r)
      ranks.submit({1, 2, static_cast<std::int32_t>(3 + r)}, greedy(1000));
    ranks.run();
    const std::string why = "rank " + std::to_string(failing) + ": the device is gone";
    EXPECT_EQ(told, std::vector<std::string>{why});
    EXPECT_EQ(ranks.ended, static_cast<int>(requests));
    for (auto& [id, of] : ranks.results) {
      EXPECT_EQ(of[0].finish, FinishReason::kError);
      EXPECT_EQ(of[0].error, "the model failed: " + why);
    }
  }
}

// What fails on the host of one rank, or in a handler, is no matter of the others.
TEST(EngineOfRanks, AThrowingHandlerEndsItsRequestAlone) {
  Ranks ranks(2);
  ranks.core.submit(request({1, 2}, greedy(50)),
                    [](const GenerationEvent&) { throw std::runtime_error("gone"); });
  const RequestId id = ranks.submit({3, 4}, greedy(20));
  ranks.run();
  EXPECT_EQ(ranks.results[id][0].tokens, continuation({3, 4}, 20));
  EXPECT_EQ(ranks.core.stats().cancelled, 1);
}

// A router has chosen where a request runs.
TEST(EngineOfRanks, ARequestRunsOnTheRankThatItNames) {
  EngineOptions o = Harness::defaults();
  o.cache_events = true;
  Ranks ranks(3, o);
  const auto submit = [&](std::optional<int> rank) {
    Request r = request(Tokens(100, 5), greedy(2));
    r.data_parallel_rank = rank;
    ranks.core.check(r);
    return ranks.core.submit(std::move(r), [&](const GenerationEvent& e) { ranks.take(e); });
  };
  // The first would go to rank 0, the others to where its prefix is cached.
  for (const int rank : {2, 0, 2, 1}) {
    const RequestId id = submit(rank);
    ranks.run();
    EXPECT_EQ(ranks.results.at(id).at(0).finish, FinishReason::kLength);
  }
  std::vector<int> stored;
  for (const CacheEvent& e : ranks.core.take_cache_events()) stored.push_back(e.rank);
  std::ranges::sort(stored);
  EXPECT_EQ(stored, (std::vector{0, 1, 2})) << "a page of the prompt on each";
  const std::vector<EngineLoad> loads = ranks.core.rank_loads();
  ASSERT_EQ(loads.size(), 3u);
  const EngineLoad all = ranks.core.load();
  for (const auto field : {&EngineLoad::prefix_tokens_hit, &EngineLoad::prefix_tokens_looked_up})
    EXPECT_EQ(loads[0].*field + loads[1].*field + loads[2].*field, all.*field);
  EXPECT_EQ(loads[2].prefix_tokens_looked_up, 200);
  EXPECT_EQ(loads[2].prefix_tokens_hit, 64);
  EXPECT_EQ(loads[1].pages_cached, 1);
  EXPECT_EQ(loads[1].pages_total * 3, all.pages_total);
  for (const int wrong : {-1, 3}) {
    try {
      submit(wrong);
      ADD_FAILURE() << wrong;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(std::string(e.what()),
                "data_parallel_rank is " + std::to_string(wrong) + ", expected 0 to 2");
    }
  }
}

}  // namespace
}  // namespace flash_mla::engine
