#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "harness.h"

namespace flash_mla::engine {

// Requests of every kind that come, end and are cancelled at random, the same with and without steps in
// flight.
struct Scenario {
  struct Outcome {
    std::map<int, Result> results;
    bool cancelled = false;
  };

  explicit Scenario(unsigned seed) : random(seed) {
    options = Harness::defaults();
    options.num_pages = 6 + static_cast<int>(random() % 16);
    options.max_batch_size = 1 + static_cast<int>(random() % 8);
    options.max_tokens_per_step = options.max_batch_size + static_cast<int>(random() % 200);
    options.prefix_cache = random() % 2 == 0;
    const Tokens common = random_prompt(random, 200);
    for (int i = 0; i < 25; ++i) {
      const std::size_t length = 1 + random() % 250;
      prompts.push_back(random_prompt(random, length, random() % 2 == 0 ? common : Tokens()));
      SamplingParams p = greedy(1 + static_cast<int>(random() % 150));
      p.ignore_eos = random() % 2 == 0;
      if (random() % 3 == 0) p.stop_token_ids = {static_cast<std::int32_t>(random() % 90)};
      if (random() % 4 == 0) p.stop = {fake_text(static_cast<std::int32_t>(1 + random() % 25))};
      if (random() % 2 == 0) {
        p.temperature = 0.9;
        p.seed = random();
        p.top_k = random() % 2 == 0 ? 5 : 0;
        p.top_p = random() % 2 == 0 ? 0.8 : 1;
        p.min_p = random() % 3 == 0 ? 0.05 : 0;
        p.presence_penalty = random() % 8 == 0 ? 0.5 : 0;
        p.n = random() % 5 == 0 ? 3 : 1;
      }
      if (random() % 10 == 0) p.logprobs = 1;
      if (random() % 10 == 0) p.prompt_logprobs = 0;
      if (random() % 8 == 0) p.repetition_penalty = 1.2;
      if (random() % 8 == 0)
        p.min_tokens = static_cast<int>(random() % static_cast<unsigned>(p.max_tokens + 1));
      if (random() % 8 == 0) p.logit_bias = {{static_cast<std::int32_t>(random() % 90), 1.5}};
      if (random() % 8 == 0) p.allowed_token_ids = {0, 3, 9, 27, 81};
      if (random() % 8 == 0) p.bad_token_ids = {{static_cast<std::int32_t>(random() % 90)}, {3, 9}};
      if (random() % 12 == 0) prompts.back().back() = FakeModel::kNaN;
      params.push_back(p);
      waits.push_back(static_cast<int>(random() % 6));
      cancels.push_back(random() % 6 == 0 ? static_cast<int>(random() % 25) : -1);
    }
  }

  std::vector<Outcome> run(FakeRuns runs, bool overlap, std::size_t* most_flights, EngineStats* stats,
                           std::unique_ptr<Drafter> drafter = nullptr) {
    Harness::runs = runs;
    options.overlap_steps = overlap;
    Harness h(options, 4096, std::move(drafter));
    h.model->takes_masks = takes_masks;
    std::vector<RequestId> ids;
    std::multimap<int, RequestId> cancel_at;
    int steps = 0;
    const auto step = [&] {
      const auto [begin, end] = cancel_at.equal_range(steps);
      for (auto it = begin; it != end; ++it) h.core->cancel(it->second);
      ++steps;
      h.core->step();
    };
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      if (static_cast<std::int64_t>(prompts[i].size()) >= h.core->max_length()) prompts[i].resize(100);
      ids.push_back(h.submit(prompts[i], params[i]));
      if (cancels[i] >= 0) cancel_at.emplace(steps + cancels[i], ids.back());
      for (int k = 0; k < waits[i]; ++k) step();
    }
    for (int k = 0; k < 40; ++k) step();
    h.run();
    std::vector<Outcome> out;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      EXPECT_TRUE(h.ended[ids[i]]);
      out.push_back({h.results[ids[i]], cancels[i] >= 0});
    }
    *most_flights = h.model->most_flights;
    *stats = h.core->stats();
    module_gaps = h.model->module_gaps;
    return out;
  }

  std::mt19937 random;
  EngineOptions options;
  std::vector<Tokens> prompts;
  std::vector<SamplingParams> params;
  std::vector<int> waits, cancels;
  bool takes_masks = false;  ///< of the model
  int module_gaps = 0;       ///< in the last run
};

inline void expect_same(const std::vector<Scenario::Outcome>& expected,
                        const std::vector<Scenario::Outcome>& out) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    for (const auto& [index, a] : expected[i].results) {
      ASSERT_TRUE(out[i].results.contains(index));
      const Result& b = out[i].results.at(index);
      const bool cut = expected[i].cancelled;  // how much came before is a matter of time
      const std::size_t common = std::min(a.tokens.size(), b.tokens.size());
      EXPECT_TRUE(std::equal(a.tokens.begin(), a.tokens.begin() + static_cast<std::ptrdiff_t>(common),
                             b.tokens.begin()));
      if (cut) continue;
      EXPECT_EQ(a.tokens, b.tokens);
      EXPECT_EQ(a.text, b.text);
      EXPECT_EQ(a.finish, b.finish);
      EXPECT_EQ(a.error, b.error);
      EXPECT_EQ(a.usage.completion_tokens, b.usage.completion_tokens);
      ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
      for (std::size_t k = 0; k < a.logprobs.size(); ++k) {
        EXPECT_EQ(a.logprobs[k].chosen.token, b.logprobs[k].chosen.token);
        EXPECT_EQ(a.logprobs[k].chosen.logprob, b.logprobs[k].chosen.logprob);
        EXPECT_EQ(a.logprobs[k].rank, b.logprobs[k].rank);
      }
    }
  }
}

}  // namespace flash_mla::engine
