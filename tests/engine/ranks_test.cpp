// The engine over a model that several ranks share: models/small with whatever a request can ask for, and what is left
// when a rank fails.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine_core.h"
#include "flash_mla/engine.h"
#include "model/parallel/parallel_model.h"
#include "sanitized.h"

namespace flash_mla {
namespace {

constexpr int kRequests = 10;  // enough for sequences to be preempted
// Under a sanitizer every step takes many times as long, and what there is to find is in the fewest ranks already.
constexpr int kCancelled = unless_sanitized(170, 25);
constexpr auto kRanks = unless_sanitized(std::array{2, 4}, std::array{2});
constexpr auto kGroups = unless_sanitized(std::array{std::pair(2, 1), std::pair(1, 2), std::pair(2, 2)},
                                          std::array{std::pair(2, 2)});

EngineOptions options(int tp) {
  EngineOptions o;
  o.device = EngineOptions::Device::kCpu;
  o.batch_invariant = true;
  o.num_pages = 8;  // so few that sequences are preempted
  o.max_batch_size = 12;
  o.max_tokens_per_step = 96;
  o.num_threads = tp;
  o.tp = tp;
  return o;
}

std::vector<Request> requests(int count) {
  const std::vector<std::string> openings = {"And it came to pass", "CHAPTER I\n\nEmma was",
                                             "And the sons of", "In the beginning", "Blessed are the"};
  std::mt19937 random(7);
  std::vector<Request> out;
  for (int i = 0; i < count; ++i) {
    Request& r = out.emplace_back();
    // Half of them begin alike, for more than a page.
    for (int k = 0; i % 3 == 0 && k < 20; ++k) r.prompt += openings[0] + ", ";
    for (unsigned k = 0, parts = 1 + random() % 12; k < parts; ++k)
      r.prompt += (k > 0 ? ", " : "") + openings[random() % openings.size()];
    SamplingParams& p = r.sampling;
    p.max_tokens = 20 + static_cast<int>(random() % 60);
    p.temperature = std::vector<double>{0, 0.3, 1}[random() % 3];
    p.seed = random();
    p.ignore_eos = true;
    if (random() % 4 == 0) p.top_k = 20;
    if (random() % 5 == 0) p.repetition_penalty = 1.1;
    if (random() % 6 == 0) p.logprobs = 2;
    if (random() % 8 == 0) p.n = 2;
  }
  return out;
}

void expect_equal(const std::vector<Completion>& expected, const std::vector<Completion>& out) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_EQ(expected[i].choices.size(), out[i].choices.size());
    for (std::size_t k = 0; k < out[i].choices.size(); ++k) {
      const Completion::Choice &a = expected[i].choices[k], &b = out[i].choices[k];
      EXPECT_EQ(a.token_ids, b.token_ids);
      EXPECT_EQ(b.error, "");
      ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
      for (std::size_t t = 0; t < a.logprobs.size(); ++t)
        EXPECT_EQ(a.logprobs[t].chosen.logprob, b.logprobs[t].chosen.logprob) << "to the bit";
    }
  }
}

TEST(EngineOnRanks, WritesTheTextOfOneRank) {
  const std::vector<Request> all = requests(kRequests);
  Engine one(FLASH_MLA_SMALL_MODEL, options(1));
  const std::vector<Completion> expected = one.generate(all);
  EXPECT_TRUE(one.stats().ranks.empty());
  for (const int tp : kRanks) {
    SCOPED_TRACE(tp);
    EngineOptions o = options(tp);
    if (tp == 4) o.expert_placement = "round-robin";
    Engine engine(FLASH_MLA_SMALL_MODEL, o);
    const std::vector<Completion> out = engine.generate(all);
    expect_equal(expected, out);
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.pages_used, 0);
    EXPECT_GT(stats.preemptions, 0);
    EXPECT_GT(stats.prefix_tokens_hit, 0);
    EXPECT_EQ(stats.bytes_per_page, static_cast<std::size_t>(tp) * one.stats().bytes_per_page);
    ASSERT_EQ(stats.ranks.size(), static_cast<std::size_t>(tp));
    for (const RankStats& rank : stats.ranks) {
      EXPECT_GT(rank.bytes_sent, 0);
      EXPECT_EQ(rank.exchanges, stats.ranks[0].exchanges);
    }
  }
}

// Wherever a request runs, and whatever is drafted.
TEST(EngineOnRanks, WithRequestsOfTheirOwnWriteItToo) {
  const std::vector<Request> all = requests(kRequests);
  Engine one(FLASH_MLA_SMALL_MODEL, options(1));
  const std::vector<Completion> expected = one.generate(all);
  for (const int dp : kRanks) {
    SCOPED_TRACE(dp);
    EngineOptions o = options(1);
    o.num_threads = o.dp = dp;
    if (dp == 4) {
      o.ep = 2;
    } else {
      o.speculative = EngineOptions::Speculative::kMtp;
    }
    Engine engine(FLASH_MLA_SMALL_MODEL, o);
    EXPECT_GT(engine.stats().weight_bytes, one.stats().weight_bytes);
    EXPECT_LT(engine.stats().weight_bytes, dp * one.stats().weight_bytes);
    expect_equal(expected, engine.generate(all));
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.pages_used, 0);
    EXPECT_EQ(stats.pages_total, 8 * dp);
    EXPECT_EQ(stats.bytes_per_page, one.stats().bytes_per_page * (dp == 2 ? 6 : 5) / 5)
        << "with the module's";
    ASSERT_EQ(stats.ranks.size(), static_cast<std::size_t>(dp));
    for (const RankStats& rank : stats.ranks) {
      EXPECT_GT(rank.computed_tokens, 0);
      EXPECT_GT(rank.bytes_sent, 0);
      EXPECT_EQ(rank.exchanges, stats.ranks[0].exchanges);
    }
    EXPECT_EQ(stats.mtp_drafts.accepted > 0, dp == 2);
  }
}

// Two groups of two ranks, each with a cache on both of its ranks.
TEST(EngineOnRanks, OfGroupsWriteItToo) {
  const std::vector<Request> all = requests(kRequests);
  Engine one(FLASH_MLA_SMALL_MODEL, options(1));
  EngineOptions o = options(2);
  o.dp = 2;
  o.num_threads = 4;
  o.speculative = EngineOptions::Speculative::kMtp;
  Engine engine(FLASH_MLA_SMALL_MODEL, o);
  expect_equal(one.generate(all), engine.generate(all));
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.pages_used, 0);
  EXPECT_EQ(stats.pages_total, 16);
  EXPECT_GT(stats.mtp_drafts.accepted, 0);
  ASSERT_EQ(stats.ranks.size(), 4u);
  for (const RankStats& rank : stats.ranks) {
    EXPECT_GT(rank.bytes_sent, 0);
    EXPECT_GT(rank.weight_bytes, 0);
  }
  for (const std::size_t first : {0u, 2u}) {
    EXPECT_GT(stats.ranks[first].computed_tokens, 0);
    EXPECT_EQ(stats.ranks[first].pages_total, 8);
    EXPECT_EQ(stats.ranks[first + 1].pages_total, 0) << "those of the first of its group";
  }
  for (const ExpertCounts& layer : stats.experts) {
    std::int64_t chosen = 0, run = 0;
    for (const std::int64_t count : layer.counts) chosen += count;
    for (const std::int64_t count : layer.rank_counts) run += count;
    EXPECT_EQ(layer.rank_counts.size(), 4u);
    EXPECT_EQ(chosen, run) << "layer " << layer.layer;
  }
}

// Side by side, as processes; each with its part of every step.
TEST(EngineOnRanks, StandSideBySideInTheTimeline) {
  for (const auto& [tp, dp] : kGroups) {
    SCOPED_TRACE(testing::Message() << tp << " x " << dp);
    EngineOptions o = options(tp);
    o.dp = dp;
    Engine engine(FLASH_MLA_SMALL_MODEL, o);
    engine.generate(requests(4));
    std::set<int> seen;
    for (const StepRecord& step : engine.timeline()) {
      ASSERT_EQ(step.ranks.size(), static_cast<std::size_t>(tp));
      for (const StepRecord::Rank& rank : step.ranks) {
        seen.insert(rank.rank);
        EXPECT_EQ(rank.rank / tp, step.rank);
        EXPECT_LE(step.begin, rank.begin);
        EXPECT_LE(rank.begin, rank.end);
        EXPECT_LE(rank.end, step.end);
        EXPECT_GT(rank.exchange_seconds, 0);
        EXPECT_LE(rank.exchange_seconds, rank.end - rank.begin);
      }
    }
    EXPECT_EQ(std::ssize(seen), tp * dp);
    const std::string trace = engine.chrome_trace();
    for (const int rank : seen)
      EXPECT_NE(trace.find("flash_mla engine, rank " + std::to_string(rank)), std::string::npos);
  }
  Engine one(FLASH_MLA_SMALL_MODEL, options(1));
  one.generate(requests(1));
  EXPECT_TRUE(one.timeline().at(0).ranks.empty());
}

void cancel_at_random(int tp, int dp) {
  EngineOptions o = options(tp);
  o.dp = dp;
  o.num_threads = tp * dp;
  o.batch_invariant = false;
  Engine engine(FLASH_MLA_SMALL_MODEL, o);
  std::mt19937 random(11);
  std::vector<RequestId> ids;
  int left = kCancelled, ended = 0;
  while (ended < kCancelled) {
    while (left > 0 && random() % 3 != 0) {
      Request r;
      const auto length = 1 + random() % 150;
      for (unsigned i = 0; i < length; ++i)
        r.prompt_token_ids.push_back(static_cast<std::int32_t>(3 + i % 17 + random() % 2));
      r.sampling.max_tokens = 1 + static_cast<int>(random() % 30);
      r.sampling.ignore_eos = true;
      ids.push_back(engine.submit(std::move(r), [&](const GenerationEvent& e) { ended += e.last; }));
      --left;
    }
    if (!ids.empty() && random() % 4 == 0) engine.cancel(ids[random() % ids.size()]);
    engine.step();
  }
  EXPECT_EQ(engine.stats().pages_used, 0);
  for (const RankStats& rank : engine.stats().ranks) EXPECT_EQ(rank.pages_used, 0);
  EXPECT_EQ(engine.stats().failed, 0);
  EXPECT_GT(engine.stats().cancelled, 0);
}

// 510 requests in all.
TEST(EngineOnRanks, HasNoPageInUseAfterRandomCancels) {
  for (const auto& [tp, dp] : kGroups) {
    SCOPED_TRACE(testing::Message() << tp << " x " << dp);
    cancel_at_random(tp, dp);
  }
}

// Wraps the model of one rank and throws from some step on.
class Failing : public model::Model {
 public:
  Failing(int rank, const std::atomic<int>& failing_rank, const std::atomic<int>& steps_left)
      : rank_(rank), failing_rank_(failing_rank), steps_left_(steps_left) {}
  int vocab_size() const override { return 8; }
  std::int64_t max_position() const override { return 1024; }
  std::size_t bytes_per_page() const override { return 64; }
  ScheduleOptions schedule_options(int /*sequences*/, bool /*batch_invariant*/) const override {
    ScheduleOptions out;
    out.num_parts = 1;
    return out;
  }
  void allocate_cache(int /*num_pages*/) override {}
  void copy_page(int /*source*/, int /*target*/) override {}
  void reserve(int /*num_tokens*/, int /*num_rows*/) override {}
  void launch(const model::ForwardBatch& batch) override {
    if (rank_ == failing_rank_ && steps_left_ <= 0) throw std::runtime_error("the device is gone");
    rows_ = batch.logit_rows.size();
    tokens_ = batch.drawn_rows.size() + batch.greedy_rows.size();
  }
  void collect(float* logits, std::int32_t* tokens) override {
    std::fill_n(logits, rows_ * 8, 0.0f);
    std::fill_n(tokens, tokens_, 5);
  }

 private:
  int rank_;
  const std::atomic<int>&failing_rank_, &steps_left_;
  std::size_t rows_ = 0, tokens_ = 0;
};

TEST(EngineOnRanks, EndsWithTheNameOfARankThatFails) {
  std::atomic<int> failing_rank{-1}, steps_left{4};
  auto model = std::make_unique<model::ParallelModel>(3, [&](int rank, comm::Communicator&) {
    return std::make_unique<Failing>(rank, failing_rank, steps_left);
  });
  std::vector<std::string> told;
  EngineOptions o;
  o.num_pages = 16;
  o.on_broken = [&](const std::string& why) { told.push_back(why); };
  engine::EngineCore core(std::move(model), nullptr, {}, o);
  std::vector<std::string> errors;
  const auto submit = [&] {
    Request r;
    r.prompt_token_ids = {1, 2, 3};
    r.sampling.max_tokens = 100;
    r.sampling.temperature = 0;
    core.submit(std::move(r), [&](const GenerationEvent& e) {
      if (e.finish == FinishReason::kError) errors.push_back(e.error);
    });
  };
  failing_rank = 2;
  submit();
  submit();
  for (int i = 0; i < 10 && errors.size() < 2; ++i, --steps_left) core.step();
  submit();
  for (int i = 0; i < 10 && errors.size() < 3; ++i) core.step();
  ASSERT_EQ(errors.size(), 3u);
  for (const std::string& error : errors) EXPECT_EQ(error, "the model failed: rank 2: the device is gone");
  EXPECT_EQ(told, std::vector<std::string>{"rank 2: the device is gone"});
  EXPECT_EQ(core.stats().pages_used, 0);
}

}  // namespace
}  // namespace flash_mla
