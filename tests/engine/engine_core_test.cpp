#include "engine/engine_core.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "engine/stop_matcher.h"
#include "engine/trace.h"
#include "flash_mla/error.h"
#include "harness.h"
#include "sanitized.h"
#include "scenario.h"

namespace flash_mla::engine {
namespace {

// Every test with a model that runs at once, and with ones whose steps are launched ahead.
class EngineCoreTest : public testing::TestWithParam<FakeRuns> {
 protected:
  void SetUp() override { Harness::runs = GetParam(); }
};

std::string runs_name(const testing::TestParamInfo<FakeRuns>& runs) {
  static constexpr const char* kNames[] = {"AtOnce", "Early", "Late", "Either"};
  return kNames[static_cast<int>(runs.param)];
}

INSTANTIATE_TEST_SUITE_P(Fake, EngineCoreTest,
                         testing::Values(FakeRuns::kAtOnce, FakeRuns::kEarly, FakeRuns::kLate,
                                         FakeRuns::kEither),
                         runs_name);

TEST_P(EngineCoreTest, GreedyContinuation) {
  Harness h;
  const Tokens prompt = {5, 6, 7};
  const Result r = h.generate(prompt, greedy(150));
  EXPECT_EQ(r.tokens, continuation(prompt, 150));
  EXPECT_EQ(r.finish, FinishReason::kLength);
  EXPECT_EQ(r.events, 150);
  EXPECT_EQ(r.usage.prompt_tokens, 3);
  EXPECT_EQ(r.usage.completion_tokens, 150);
  std::string text;
  for (const std::int32_t t : r.tokens) text += fake_text(t);
  EXPECT_EQ(r.text, text);
}

TEST_P(EngineCoreTest, SameTokensUnderEverySchedule) {
  Load load;
  EngineOptions alone = Harness::defaults();
  alone.num_pages = 200;
  alone.max_tokens_per_step = 4096;
  alone.prefix_cache = false;
  EngineStats stats;
  const auto expected = load.run(alone, /*stagger=*/-1, &stats);
  EXPECT_EQ(stats.preemptions, 0);
  EXPECT_EQ(expected[0].at(0), continuation(load.prompts[0], load.params[0].max_tokens));
  std::size_t choices = 0;
  for (const auto& e : expected) choices += e.size();
  EXPECT_EQ(choices, 24u + 6 * 2);

  EngineOptions o = alone;
  o.prefix_cache = true;
  EXPECT_EQ(load.run(o, -1, &stats), expected) << "with prefix reuse";
  EXPECT_GT(stats.prefix_tokens_hit, 1000);
  o = alone;
  EXPECT_EQ(load.run(o, 0, &stats), expected) << "batched";
  EXPECT_EQ(load.run(o, 2, &stats), expected) << "joining at different steps";
  o.max_tokens_per_step = 16;
  EXPECT_EQ(load.run(o, 0, &stats), expected) << "in small chunks";
  o.max_tokens_per_step = 37;
  EXPECT_EQ(load.run(o, 1, &stats), expected) << "in odd chunks";
  for (const bool prefix_cache : {false, true}) {
    o = alone;
    o.prefix_cache = prefix_cache;
    o.num_pages = 12;
    o.max_tokens_per_step = 128;
    EXPECT_EQ(load.run(o, 0, &stats), expected) << "with preemption, prefix cache " << prefix_cache;
    EXPECT_GT(stats.preemptions, 2);
    EXPECT_EQ(load.run(o, 3, &stats), expected) << "with preemption, prefix cache " << prefix_cache;
  }
  o.max_batch_size = 1;
  EXPECT_EQ(load.run(o, 0, &stats), expected) << "a batch of one, so forks wait";
}

TEST(OverlappedSteps, ChangeNothing) {
  constexpr int kSeeds = unless_sanitized(40, 12);
  int preempted = 0, ahead = 0;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(seed);
    Scenario scenario(seed);
    scenario.takes_masks = seed % 2 == 1;
    std::size_t flights = 0;
    EngineStats stats;
    const auto expected = scenario.run(FakeRuns::kAtOnce, true, &flights, &stats);
    EXPECT_EQ(flights, 1u) << "a model that runs at once needs nothing ahead";
    preempted += stats.preemptions > 0;
    for (const FakeRuns runs : {FakeRuns::kEarly, FakeRuns::kLate, FakeRuns::kEither}) {
      const auto out = scenario.run(runs, true, &flights, &stats);
      ahead += flights == 2;
      expect_same(expected, out);
    }
    scenario.run(FakeRuns::kEarly, false, &flights, &stats);
    EXPECT_EQ(flights, 1u) << "without overlap_steps";
  }
  EXPECT_GT(preempted, kSeeds / 8);
  EXPECT_GT(ahead, kSeeds * 5 / 2) << "of three runs each";
}

TEST(OverlappedSteps, CountTokensOnce) {
  Harness::runs = FakeRuns::kLate;
  Harness h;
  Tokens stopping;  // a prompt that ends by a token, while its next step is on its way
  SamplingParams p = greedy(200);
  p.ignore_eos = false;
  Result r;
  for (std::int32_t first = 1; first < 90 && r.finish != FinishReason::kStop; ++first) {
    stopping = {first};
    r = h.generate(stopping, p);
  }
  ASSERT_EQ(r.finish, FinishReason::kStop);
  const EngineStats before = h.core->stats();
  EXPECT_EQ(h.generate(stopping, p).tokens, r.tokens);
  const EngineStats after = h.core->stats();
  const auto count = static_cast<std::int64_t>(r.tokens.size());
  EXPECT_EQ(after.generated_tokens - before.generated_tokens, count);
  EXPECT_EQ(after.computed_tokens - before.computed_tokens, count);
  EXPECT_EQ(after.steps - before.steps, count);
  EXPECT_EQ(h.model->most_flights, 2u);
}

TEST(OverlappedSteps, ANewRequestWaitsForOneStepAtMost) {
  Harness::runs = FakeRuns::kLate;
  Harness h;
  h.submit({1}, greedy(100));
  for (int i = 0; i < 5; ++i) h.core->step();
  const RequestId id = h.submit({2, 3}, greedy(100));
  h.core->step();  // that one was on its way
  EXPECT_TRUE(h.results[id][0].tokens.empty());
  h.core->step();
  EXPECT_EQ(h.results[id][0].tokens.size(), 1u);
  // And one that has no place yet keeps nobody from overlapping.
  EngineOptions o = Harness::defaults();
  o.max_batch_size = 1;
  Harness full(o);
  full.submit({1}, greedy(20));
  full.submit({2}, greedy(20));
  for (int i = 0; i < 3; ++i) full.core->step();
  EXPECT_EQ(full.model->most_flights, 2u);
}

TEST(OverlappedSteps, AFailingModelEndsWhatWasInTheStep) {
  // The crash comes out of collect(), while the next step is on its way already.
  Harness::runs = FakeRuns::kLate;
  Harness h;
  int steps = 0;
  h.model->on_forward = [&](const model::ForwardBatch&) {
    if (++steps == 5) throw std::runtime_error("the device fell over");
  };
  SamplingParams p = greedy(50);
  p.n = 2;
  const RequestId a = h.submit({1, 2}, greedy(50));
  const RequestId b = h.submit({3}, p);
  h.run();
  EXPECT_NE(h.results[a][0].error.find("fell over"), std::string::npos);
  EXPECT_EQ(h.results[a][0].tokens.size(), 4u);
  EXPECT_EQ(h.results[b][1].finish, FinishReason::kError);
  h.model->on_forward = nullptr;
  EXPECT_EQ(h.generate({1, 2}, greedy(50)).tokens, continuation({1, 2}, 50));
}

TEST_P(EngineCoreTest, ContinuationsOfOnePrompt) {
  Harness h;
  std::mt19937 random(3);
  SamplingParams p = greedy(30);
  p.temperature = 1;
  p.seed = 5;
  p.n = 4;
  const RequestId id = h.submit(random_prompt(random, 200), p);
  std::int64_t prompt_tokens = 0;
  h.model->on_forward = [&](const model::ForwardBatch& b) {
    prompt_tokens += static_cast<std::int64_t>(b.token_ids.size() > 4 ? b.token_ids.size() : 0);
  };
  h.run();
  ASSERT_EQ(h.results[id].size(), 4u);
  EXPECT_EQ(prompt_tokens, 200) << "the prompt is computed once";
  EXPECT_TRUE(h.ended[id]);
  for (int i = 1; i < 4; ++i) EXPECT_NE(h.results[id][i].tokens, h.results[id][0].tokens);
  EXPECT_GE(h.core->stats().pages_copied, 3);
}

TEST_P(EngineCoreTest, SeedsDecide) {
  Harness h;
  SamplingParams p = greedy(30);
  p.temperature = 1;
  p.seed = 5;
  const Result a = h.generate({1, 2, 3}, p), b = h.generate({1, 2, 3}, p);
  EXPECT_EQ(a.tokens, b.tokens);
  p.seed = 6;
  EXPECT_NE(h.generate({1, 2, 3}, p).tokens, a.tokens);
  p.seed.reset();
  EXPECT_NE(h.generate({1, 2, 3}, p).tokens, h.generate({1, 2, 3}, p).tokens);
}

TEST_P(EngineCoreTest, EndOfSentence) {
  Harness h;
  // A prompt whose continuation has the end of sentence somewhere.
  Tokens prompt, expected;
  for (std::int32_t first = 1; expected.empty(); ++first) {
    prompt = {first};
    const Tokens tokens = continuation(prompt, 40);
    const auto eos = std::find(tokens.begin(), tokens.end(), FakeModel::kEos);
    if (eos != tokens.end() && eos - tokens.begin() > 5) expected.assign(tokens.begin(), eos + 1);
    ASSERT_LT(first, 90);
  }
  SamplingParams p = greedy(40);
  EXPECT_EQ(h.generate(prompt, p).tokens.size(), 40u);
  p.ignore_eos = false;
  const Result r = h.generate(prompt, p);
  EXPECT_EQ(r.tokens, expected);
  EXPECT_EQ(r.finish, FinishReason::kStop);
  p.ignore_eos = true;
  p.stop_token_ids = {expected[3]};
  const Result s = h.generate(prompt, p);
  EXPECT_EQ(s.finish, FinishReason::kStop);
  EXPECT_EQ(s.tokens.back(), expected[3]);
  EXPECT_EQ(s.text.find(fake_text(expected[3])), std::string::npos) << "a stop token has no text";
}

TEST_P(EngineCoreTest, StopStrings) {
  Harness h;
  const std::string text = h.generate({9, 9}, greedy(40)).text;
  SamplingParams p = greedy(40);
  p.stop = {"never", text.substr(10, 4)};
  const std::size_t at = text.find(p.stop[1]);
  const Result r = h.generate({9, 9}, p);
  EXPECT_EQ(r.text, text.substr(0, at));
  EXPECT_EQ(r.finish, FinishReason::kStop);
  EXPECT_EQ(r.tokens.size(), at + 4);
  p.include_stop = true;
  EXPECT_EQ(h.generate({9, 9}, p).text, text.substr(0, at + 4));
  p.stop = {text.substr(36, 4) + "?"};
  EXPECT_EQ(h.generate({9, 9}, p).text, text) << "what was held back comes at the end";
}

TEST(StopMatcher, FindsThemInWhateverPieces) {
  std::mt19937 random(1);
  for (int round = 0; round < 5000; ++round) {
    const auto letters = [&](std::size_t n) {
      std::string s;
      while (s.size() < n) s += static_cast<char>('a' + random() % 2);
      return s;
    };
    const std::string text = letters(random() % 20);
    std::vector<std::string> stops;
    for (std::size_t i = 1 + random() % 3; i > 0; --i) stops.push_back(letters(2 + random() % 5));
    // By definition: the first position where a stop string is complete, the longest of those.
    std::string expected = text;
    bool stopped = false;
    for (std::size_t end = 0; end <= text.size() && !stopped; ++end) {
      for (const std::string& s : stops) {
        if (!text.substr(0, end).ends_with(s)) continue;
        if (!stopped || end - s.size() < expected.size()) expected = text.substr(0, end - s.size());
        stopped = true;
      }
    }
    StopMatcher matcher(stops, false);
    std::string out;
    for (std::size_t i = 0; i < text.size();) {
      const std::size_t n = 1 + random() % 4;
      out += matcher.push(text.substr(i, n));
      i += n;
      ASSERT_EQ(expected.compare(0, out.size(), out), 0) << "text came out that belongs to a stop string";
    }
    EXPECT_EQ(matcher.stopped(), stopped);
    if (!stopped) out += matcher.flush();
    ASSERT_EQ(out, expected) << text;
  }
}

TEST_P(EngineCoreTest, Logprobs) {
  Harness h;
  SamplingParams p = greedy(5);
  p.logprobs = 3;
  const Result r = h.generate({4}, p);
  ASSERT_EQ(r.logprobs.size(), 5u);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(r.logprobs[i].chosen.token, r.tokens[i]);
    EXPECT_EQ(r.logprobs[i].top.size(), 3u);
    EXPECT_EQ(r.logprobs[i].top[0].token, r.tokens[i]);
    EXPECT_LT(r.logprobs[i].chosen.logprob, 0);
  }
  p.logprobs = -1;
  EXPECT_TRUE(h.generate({4}, p).logprobs.empty());
}

TEST_P(EngineCoreTest, RefusedRequestsNameTheField) {
  EngineOptions o = Harness::defaults();
  o.num_pages = 4;
  Harness small(o), narrow(Harness::defaults(), 100);
  const auto expect_refused = [](Harness& h, const Tokens& prompt, const SamplingParams& p,
                                 const char* part) {
    try {
      h.submit(prompt, p);
      ADD_FAILURE() << "accepted, expected an error about " << part;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  expect_refused(small, {}, greedy(), "prompt has no tokens");
  expect_refused(small, Tokens(256, 1), greedy(), "the cache has 4 pages");
  expect_refused(narrow, Tokens(100, 1), greedy(), "the model's 100 positions");
  expect_refused(small, {1, 97}, greedy(), "prompt_token_ids[1] is 97, expected 0 to 96");
  expect_refused(small, {-1}, greedy(), "prompt_token_ids[0] is -1");
  SamplingParams p = greedy();
  p.top_p = 2;
  expect_refused(small, {1}, p, "top_p is 2");
  EXPECT_EQ(small.generate(Tokens(255, 1), greedy()).finish, FinishReason::kLength);
  EXPECT_EQ(small.generate(Tokens(250, 1), greedy(100)).tokens.size(), 6u) << "the longest the cache holds";
}

TEST_P(EngineCoreTest, BadOptionsNameTheField) {
  const auto expect_refused = [](const char* field, const std::function<void(EngineOptions&)>& change) {
    EngineOptions o = Harness::defaults();
    change(o);
    try {
      Harness h(o);
      ADD_FAILURE() << field << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(std::string(e.what()).rfind(field, 0), 0u) << e.what();
    }
  };
  expect_refused("num_pages", [](auto& o) { o.num_pages = -1; });
  expect_refused("memory_bytes", [](auto& o) { o.num_pages = 0, o.memory_bytes = 10; });
  expect_refused("max_model_len", [](auto& o) { o.max_model_len = -1; });
  expect_refused("max_model_len", [](auto& o) { o.max_model_len = std::int64_t{1} << 40; });
  expect_refused("max_batch_size", [](auto& o) { o.max_batch_size = 0; });
  expect_refused("max_tokens_per_step", [](auto& o) { o.max_tokens_per_step = 5; });
  expect_refused("max_waiting", [](auto& o) { o.max_waiting = -1; });
  expect_refused("num_threads", [](auto& o) { o.num_threads = -1; });
}

TEST_P(EngineCoreTest, TheCacheIsAsLargeAsUsefulAndAsTheMemoryAllows) {
  const auto pages = [](std::size_t memory_bytes, std::size_t free_bytes, std::int64_t max_position,
                        bool batch_invariant = false) {
    auto model = std::make_unique<FakeModel>(max_position);
    model->free_bytes = free_bytes;
    EngineOptions o = Harness::defaults();
    o.num_pages = 0;
    o.memory_bytes = memory_bytes;
    o.batch_invariant = batch_invariant;
    return EngineCore(std::move(model), {}, {}, o).stats().pages_total;
  };
  const std::size_t page = FakeModel().bytes_per_page();
  EXPECT_EQ(pages(0, 0, 4096), 16 * 64) << "16 sequences of 64 pages are less than 2 GiB";
  EXPECT_EQ(pages(50 * page, 0, 4096), 50);
  EXPECT_EQ(pages(0, 200 * page, 4096), 180) << "nine tenths of what the device has free";
  EXPECT_EQ(pages(0, 200 * page, 4096, true), 140) << "seven tenths: prompts leave large partial results";
  EXPECT_EQ(pages(50 * page, 200 * page, 4096), 50);
  EXPECT_EQ(pages(0, std::size_t{1} << 40, 128), 16 * 2);
  EXPECT_THROW(pages(0, page, 4096), InvalidArgument);
}

TEST_P(EngineCoreTest, ACacheLargerThanAllMemoryIsRefusedWithItsSize) {
  const auto refusal = [](int num_pages, std::size_t memory_bytes, std::size_t free_bytes) {
    auto model = std::make_unique<FakeModel>();
    model->free_bytes = free_bytes;
    EngineOptions o = Harness::defaults();
    o.num_pages = num_pages;
    o.memory_bytes = memory_bytes;
    try {
      EngineCore(std::move(model), {}, {}, o);
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const std::size_t terabytes = std::size_t{4000} << 30;
  EXPECT_NE(refusal(0, terabytes, 0).find("memory_bytes is 4294967296000, a cache of 4000.0 GiB"),
            std::string::npos)
      << refusal(0, terabytes, 0);
  EXPECT_NE(refusal(0, std::size_t{3} << 30, std::size_t{2} << 30).find("the device has 2.0 GiB"),
            std::string::npos);
  EXPECT_NE(refusal(101, 0, 100 * FakeModel().bytes_per_page()).find("num_pages is 101"), std::string::npos);
  EXPECT_EQ(refusal(100, 0, 100 * FakeModel().bytes_per_page()), "");

  struct NoMemory : FakeModel {
    void allocate_cache(int) override { throw std::bad_alloc(); }
  };
  try {
    EngineCore(std::make_unique<NoMemory>(), {}, {}, Harness::defaults());
    ADD_FAILURE() << "there was no memory";
  } catch (const OutOfMemory& e) {
    EXPECT_NE(std::string(e.what()).find("the cache of 64 pages"), std::string::npos) << e.what();
  }
}

TEST_P(EngineCoreTest, AnEndByLengthSaysWhatTheTextRanInto) {
  EngineOptions o = Harness::defaults();
  o.num_pages = 4;
  Harness small(o), narrow(Harness::defaults(), 100);
  EXPECT_EQ(small.generate({1}, greedy(7)).limit, LengthLimit::kMaxTokens);
  EXPECT_EQ(small.generate(Tokens(250, 1), greedy(100)).limit, LengthLimit::kCache);
  EXPECT_EQ(small.generate(Tokens(250, 1), greedy(6)).limit, LengthLimit::kMaxTokens) << "both at once";
  EXPECT_EQ(narrow.generate(Tokens(90, 1), greedy(100)).limit, LengthLimit::kModel);
  o.max_model_len = 90;
  Harness shorter(o);
  EXPECT_EQ(shorter.generate(Tokens(80, 1), greedy(100)).tokens.size(), 10u);
  EXPECT_EQ(shorter.generate(Tokens(80, 1), greedy(100)).limit, LengthLimit::kOption);
  EXPECT_THROW(shorter.submit(Tokens(90, 1), greedy()), InvalidArgument);
  EXPECT_STREQ(length_limit_name(LengthLimit::kOption), "max_model_len");
  SamplingParams p = greedy(100);
  p.stop_token_ids = continuation({1}, 3);
  EXPECT_EQ(small.generate({1}, p).limit, LengthLimit::kNone) << "it stopped";
  EXPECT_STREQ(length_limit_name(LengthLimit::kCache), "cache");
}

TEST_P(EngineCoreTest, StepsThatCannotBePreparedAheadAreDoneAfterwards) {
  Harness h;
  h.model->refuses_to_plan_ahead = true;
  EXPECT_EQ(h.generate({1, 2, 3}, greedy(30)).tokens, continuation({1, 2, 3}, 30));
  EXPECT_EQ(h.model->most_flights, 1U);
  h.model->refuses_to_plan_ahead = false;
  EXPECT_EQ(h.generate({4, 5}, greedy(30)).tokens, continuation({4, 5}, 30));
  EXPECT_EQ(h.core->stats().running, 0);
}

TEST_P(EngineCoreTest, AFailedRequestDoesNotDisturbItsNeighbours) {
  Harness h;
  std::mt19937 random(2);
  const Tokens prompt = random_prompt(random, 150);
  Tokens nan = prompt, crash = prompt;
  nan.push_back(FakeModel::kNaN);
  const RequestId a = h.submit(prompt, greedy(30));
  SamplingParams three = greedy(30);
  three.n = 3;
  const RequestId b = h.submit(nan, three);
  const RequestId c = h.submit({1, 2, 3}, greedy(30));
  h.run();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(h.results[b][i].finish, FinishReason::kError);
    EXPECT_NE(h.results[b][i].error.find("logits hold NaN"), std::string::npos) << h.results[b][i].error;
    EXPECT_TRUE(h.results[b][i].tokens.empty());
  }
  EXPECT_TRUE(h.ended[b]);
  EXPECT_EQ(h.results[a][0].tokens, continuation(prompt, 30));
  EXPECT_EQ(h.results[c][0].tokens, continuation({1, 2, 3}, 30));
  EXPECT_EQ(h.core->stats().failed, 3);

  // A step in which the model throws: those in it fail, those that wait go on.
  crash.push_back(FakeModel::kCrash);
  const RequestId d = h.submit(crash, three);
  h.core->step();
  EXPECT_EQ(h.results[d][2].finish, FinishReason::kError);
  EXPECT_NE(h.results[d][0].error.find("crash token"), std::string::npos);
  EXPECT_EQ(h.generate(prompt, greedy(30)).tokens, continuation(prompt, 30));
}

TEST_P(EngineCoreTest, AThrowingHandlerEndsItsRequestAlone) {
  Harness h;
  int calls = 0;
  h.core->submit(request({1}, greedy(1000)), [&](const GenerationEvent&) {
    ++calls;
    throw std::runtime_error("handler");
  });
  EXPECT_EQ(h.generate({1, 2, 3}, greedy(30)).tokens, continuation({1, 2, 3}, 30));
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(h.core->stats().cancelled, 1);
}

TEST_P(EngineCoreTest, Cancel) {
  Harness h;
  const RequestId a = h.submit({1}, greedy(1000));
  SamplingParams p = greedy(1000);
  p.n = 2;
  p.temperature = 1;
  const RequestId b = h.submit({2}, p);
  for (int i = 0; i < 5; ++i) h.core->step();
  const RequestId c = h.submit({3}, p);
  h.core->cancel(b);
  h.core->cancel(c);  // never ran
  h.core->cancel(12345);
  h.core->step();
  for (const RequestId id : {b, c}) {
    EXPECT_EQ(h.results[id][0].finish, FinishReason::kCancelled);
    EXPECT_EQ(h.results[id][1].finish, FinishReason::kCancelled);
    EXPECT_TRUE(h.ended[id]);
  }
  EXPECT_EQ(h.core->stats().pages_used, 1) << "pages are free within a step";
  EXPECT_EQ(h.results[a][0].finish, FinishReason::kNone);
  h.core->cancel_all();
  EXPECT_EQ(h.results[a][0].finish, FinishReason::kCancelled);
  EXPECT_EQ(h.core->stats().pages_used, 0);
  EXPECT_EQ(h.core->stats().cancelled, 5);
  EXPECT_FALSE(h.core->step());
}

TEST_P(EngineCoreTest, CancelOneContinuation) {
  Harness h;
  SamplingParams p = greedy(40);
  p.n = 3;
  p.temperature = 1;
  const RequestId id = h.submit({2}, p);
  h.core->cancel(id, 1);  // it has not begun
  for (int i = 0; i < 5; ++i) h.core->step();
  EXPECT_EQ(h.results[id][1].finish, FinishReason::kNone);
  h.core->cancel(id, 1);
  h.core->cancel(id, 7);
  h.core->step();
  EXPECT_EQ(h.results[id][1].finish, FinishReason::kCancelled);
  EXPECT_FALSE(h.ended[id]);
  h.run();
  EXPECT_TRUE(h.ended[id]);
  for (const int other : {0, 2}) {
    EXPECT_EQ(h.results[id][other].finish, FinishReason::kLength);
    EXPECT_EQ(h.results[id][other].tokens.size(), 40u);
  }
  EXPECT_LT(h.results[id][1].tokens.size(), 10u);
}

// Tokens whose remainders by 3 take turns, forty of them.
class Turns : public grammar::Matcher {
 public:
  void allowed(std::span<std::uint32_t> mask) override {
    std::ranges::fill(mask, 0U);
    for (std::size_t t = 1; t < 90; ++t) {
      if (t % 3 == turn_ % 3) mask[t / 32] |= 1U << (t % 32);
    }
  }
  bool accept(std::int32_t token) override { return static_cast<std::size_t>(token) % 3 == turn_++ % 3; }
  bool accept_text(std::string_view) override { return false; }
  bool ended() const override { return turn_ == 40; }

 private:
  std::size_t turn_ = 0;
};

class TurnsGrammar : public grammar::Grammar {
 public:
  std::unique_ptr<grammar::Matcher> matcher(std::vector<std::int32_t>) const override {
    return std::make_unique<Turns>();
  }
  std::size_t num_bytes() const override { return 0; }
};

TEST_P(EngineCoreTest, AModelThatTakesMasksChoosesWhatTheHostWould) {
  std::vector<std::map<RequestId, std::map<int, Result>>> results;
  for (const bool takes_masks : {false, true}) {
    Harness h;
    h.model->takes_masks = takes_masks;
    std::size_t masked = 0, rows = 0;
    h.model->on_forward = [&](const model::ForwardBatch& batch) {
      masked += batch.masked;
      rows += batch.logit_rows.size();
    };
    for (int i = 0; i < 12; ++i) {
      SamplingParams p = greedy(60);
      p.seed = static_cast<std::uint64_t>(i);
      p.temperature = i % 3 == 0 ? 0 : 1;
      p.top_k = i % 3 == 1 ? 20 : 0;
      if (i == 5) p.n = 3;
      if (i == 6) p.logprobs = 1;  // the host's in any case
      if (i == 7) p.logit_bias = {{7, 5}, {4, -3}, {7, -1.5}};
      if (i == 8) p.logit_bias = {{8, 2}, {9, 2}, {10, 2}};
      if (i == 9) p.bad_token_ids = {{4}, {9, 11}, {10}};
      if (i == 11) p.allowed_token_ids = {50, 3, 33, 64, 31, 32, 89, 7};
      if (i > 8) p.min_tokens = 30;
      if (i > 8) p.ignore_eos = false;
      Request r = request({1 + i, 2, 3}, p);
      h.core->submit(
          std::move(r), [&](const GenerationEvent& e) { h.take(e); }, /*bounded=*/true,
          i % 4 == 3 ? nullptr : std::make_shared<TurnsGrammar>());
    }
    h.run();
    EXPECT_EQ(masked > 0, takes_masks);
    EXPECT_EQ(rows < 100, takes_masks) << rows;
    results.push_back(h.results);
  }
  ASSERT_EQ(results[0].size(), 12u);
  for (const auto& [id, continuations] : results[0]) {
    for (const auto& [index, expected] : continuations) {
      const Result& got = results[1][id][index];
      EXPECT_EQ(got.tokens, expected.tokens) << id << " " << index;
      EXPECT_EQ(got.finish, expected.finish);
      EXPECT_EQ(got.tokens.size(), id % 4 == 0 ? 60u : 40u);
    }
  }
}

// While the device works at the next step the host learns this one's tokens, and what may follow them.
TEST_P(EngineCoreTest, MaskedStepsAreLaunchedAhead) {
  for (const bool overlap : {true, false}) {
    EngineOptions options = Harness::defaults();
    options.overlap_steps = overlap;
    Harness h(options);
    h.model->takes_masks = true;
    std::size_t rows = 0;
    h.model->on_forward = [&](const model::ForwardBatch& batch) { rows += batch.logit_rows.size(); };
    for (int i = 0; i < 4; ++i) {
      SamplingParams p = greedy(60);
      p.temperature = i % 2;
      p.min_tokens = 20 * i;
      if (i == 3) p.bad_token_ids = {{5}, {20, 21}};
      h.core->submit(
          request({1 + i, 2, 3}, p), [&](const GenerationEvent& e) { h.take(e); }, /*bounded=*/true,
          std::make_shared<TurnsGrammar>());
    }
    h.run();
    EXPECT_EQ(rows, 0u);
    EXPECT_EQ(h.model->most_flights, overlap && GetParam() != FakeRuns::kAtOnce ? 2u : 1u);
    for (const auto& [id, continuations] : h.results) {
      const Tokens& tokens = continuations.at(0).tokens;
      EXPECT_EQ(continuations.at(0).finish, FinishReason::kStop) << continuations.at(0).error;
      ASSERT_EQ(tokens.size(), 40u);
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        EXPECT_EQ(static_cast<std::size_t>(tokens[i]) % 3, i % 3) << id;
      }
    }
  }
}

// Excluding everything ends a request with an error, whoever chooses.
TEST_P(EngineCoreTest, RulesThatLeaveNoTokenEndTheirRequestAlone) {
  for (const bool takes_masks : {false, true}) {
    Harness h;
    h.model->takes_masks = takes_masks;
    SamplingParams p = greedy(30);
    p.allowed_token_ids = {3, 4};
    p.bad_token_ids = {{3}, {4}};
    const RequestId bad = h.submit({1, 2, 3}, p);
    EXPECT_EQ(h.generate({1, 2, 3}, greedy(30)).tokens, continuation({1, 2, 3}, 30));
    EXPECT_EQ(h.results[bad][0].finish, FinishReason::kError);
    EXPECT_NE(h.results[bad][0].error.find("what the request allows"), std::string::npos);
  }
}

TEST_P(EngineCoreTest, TheQueueIsBounded) {
  EngineOptions o = Harness::defaults();
  o.max_waiting = 2;
  o.max_batch_size = 1;
  Harness h(o);
  h.submit({1}, greedy(10));
  h.core->step();  // one runs
  h.submit({1}, greedy(10));
  const RequestId b = h.submit({1}, greedy(10));
  EXPECT_THROW(h.submit({1}, greedy(10)), Overloaded);
  h.core->cancel(b);
  h.core->step();
  EXPECT_NO_THROW(h.submit({1}, greedy(10)));
  EXPECT_THROW(h.submit({1}, greedy(10)), Overloaded);
  h.run();
  for (int i = 0; i < 5; ++i) h.generate({1}, greedy(2));
}

TEST_P(EngineCoreTest, StatsAddUp) {
  Harness h;
  std::mt19937 random(4);
  const Tokens prompt = random_prompt(random, 200);
  h.generate(prompt, greedy(10));
  h.generate(prompt, greedy(1));
  const EngineStats s = h.core->stats();
  EXPECT_EQ(s.requests_submitted, 2);
  EXPECT_EQ(s.finished_length, 2);
  EXPECT_EQ(s.prompt_tokens, 400);
  EXPECT_EQ(s.generated_tokens, 11);
  EXPECT_EQ(s.prefix_tokens_looked_up, 400);
  EXPECT_EQ(s.prefix_tokens_hit, 192);
  EXPECT_EQ(s.computed_tokens, 200 + 9 + 8);
  EXPECT_EQ(s.steps, 11);
  EXPECT_EQ(s.pages_total, 64);
  EXPECT_EQ(s.pages_cached, 3);
  EXPECT_EQ(s.ttft_seconds.total, 2);
  EXPECT_EQ(s.tpot_seconds.total, 1);
  EXPECT_EQ(s.e2e_seconds.total, 2);
  EXPECT_GT(s.schedule_utilisation, 0);
  EXPECT_LE(s.schedule_utilisation, 1);
  const std::vector<StepRecord> steps = h.core->timeline();
  ASSERT_EQ(steps.size(), 11u);
  EXPECT_EQ(steps[0].prefill_tokens, 200);
  EXPECT_EQ(steps[1].decode_tokens, 1);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    EXPECT_EQ(steps[i].step, static_cast<std::int64_t>(i));
    EXPECT_LE(steps[i].begin, steps[i].planned);
    EXPECT_LE(steps[i].planned, steps[i].computed);
    EXPECT_LE(steps[i].computed, steps[i].end);
  }
  const auto trace = nlohmann::json::parse(chrome_trace(steps));
  EXPECT_EQ(trace["traceEvents"].size(), 1 + 11u * 6);
}

TEST(Histogram, CountsAndQuantiles) {
  Histogram h;
  h.bounds = {1, 2, 4};
  EXPECT_EQ(h.quantile(0.5), 0);
  for (const double x : {0.5, 1.0, 1.5, 3.0}) h.add(x);
  EXPECT_EQ(h.counts, (std::vector<std::int64_t>{2, 1, 1, 0}));
  EXPECT_DOUBLE_EQ(h.quantile(0.5), 1);
  EXPECT_DOUBLE_EQ(h.quantile(0.75), 2);
  EXPECT_DOUBLE_EQ(h.quantile(1), 4);
  h.add(100);
  EXPECT_DOUBLE_EQ(h.quantile(1), 4) << "no more is known";
  EXPECT_DOUBLE_EQ(h.sum, 106);
}

TEST_P(EngineCoreTest, ManyThreadsSubmitAndCancel) {
  auto model = std::make_unique<FakeModel>(4096, GetParam());
  EngineOptions o = Harness::defaults();
  o.num_pages = 20;
  EngineCore core(std::move(model), {}, {FakeModel::kEos}, o);
  std::jthread stepper([&](const std::stop_token& stop) {
    while (core.wait_for_work(stop)) core.step();
  });
  constexpr int kThreads = 4, kRequests = 60;
  std::atomic<int> ended = 0, wrong = 0;
  {
    std::vector<std::jthread> clients;
    for (int c = 0; c < kThreads; ++c) {
      clients.emplace_back([&, c] {
        std::mt19937 random(static_cast<unsigned>(c));
        for (int i = 0; i < kRequests; ++i) {
          const Tokens prompt = random_prompt(random, 1 + random() % 100);
          const int count = 1 + static_cast<int>(random() % 40);
          auto tokens = std::make_shared<Tokens>();
          const RequestId id =
              core.submit(request(prompt, greedy(count)), [&, tokens, prompt](const GenerationEvent& e) {
                tokens->insert(tokens->end(), e.token_ids.begin(), e.token_ids.end());
                if (!e.last) return;
                ++ended;
                wrong += *tokens != continuation(prompt, static_cast<int>(tokens->size()));
              });
          if (random() % 4 == 0) core.cancel(id);
          if (random() % 4 == 0) core.stats();
        }
      });
    }
  }
  for (int i = 0; i < 3000 && ended < kThreads * kRequests; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(ended, kThreads * kRequests);
  EXPECT_EQ(wrong, 0);
  stepper.request_stop();
  stepper.join();
  EXPECT_EQ(core.stats().pages_used, 0);
}

}  // namespace
}  // namespace flash_mla::engine
