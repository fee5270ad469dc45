#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine_core.h"
#include "fake_model.h"

namespace flash_mla::engine {

using Tokens = std::vector<std::int32_t>;

struct Result {
  Tokens tokens;
  std::string text, error;
  std::vector<TokenLogprobs> logprobs;
  FinishReason finish = FinishReason::kNone;
  LengthLimit limit = LengthLimit::kNone;
  Usage usage;
  int events = 0;
};

inline Request request(const Tokens& prompt, const SamplingParams& sampling) {
  Request out;
  out.prompt_token_ids = prompt;
  out.sampling = sampling;
  return out;
}

// An engine over the fake model, and what came out of it.
class Harness {
 public:
  explicit Harness(const EngineOptions& options = defaults(), std::int64_t max_position = 4096,
                   std::unique_ptr<Drafter> drafter = nullptr, const std::string& weights = "fake") {
    auto fake = std::make_unique<FakeModel>(max_position, runs);
    fake->has_module = has_module;
    model = fake.get();
    core.emplace(
        std::move(fake), [] { return std::make_unique<FakeDecoder>(); }, Tokens{FakeModel::kEos}, options,
        std::move(drafter), weights);
  }

  static EngineOptions defaults() {
    EngineOptions o;
    o.num_pages = 64;
    o.max_batch_size = 16;
    o.max_tokens_per_step = 256;
    return o;
  }

  RequestId submit(const Tokens& prompt, const SamplingParams& sampling) {
    Request r = request(prompt, sampling);
    core->check(r);
    return core->submit(std::move(r), [this](const GenerationEvent& e) { take(e); });
  }

  void run() {
    for (int i = 0; i < 100000 && core->step(); ++i) {
    }
    const EngineStats stats = core->stats();
    EXPECT_EQ(stats.running + stats.waiting, 0);
    EXPECT_EQ(stats.pages_used, 0) << "leaked pages";
  }

  Result generate(const Tokens& prompt, const SamplingParams& sampling) {
    const RequestId id = submit(prompt, sampling);
    run();
    return results[id][0];
  }

  void take(const GenerationEvent& e) {
    Result& r = results[e.request][e.index];
    EXPECT_EQ(r.finish, FinishReason::kNone) << "an event after the end";
    EXPECT_FALSE(ended[e.request]) << "an event after the last";
    r.tokens.insert(r.tokens.end(), e.token_ids.begin(), e.token_ids.end());
    r.logprobs.insert(r.logprobs.end(), e.logprobs.begin(), e.logprobs.end());
    r.text += e.text;
    r.finish = e.finish;
    r.limit = e.limit;
    r.error = e.error;
    r.usage = e.usage;
    ++r.events;
    EXPECT_EQ(e.usage.completion_tokens, static_cast<std::int64_t>(r.tokens.size()));
    ended[e.request] = e.last;
  }

  static inline FakeRuns runs = FakeRuns::kAtOnce;
  static inline bool has_module = false;

  FakeModel* model = nullptr;
  std::optional<EngineCore> core;
  std::map<RequestId, std::map<int, Result>> results;
  std::map<RequestId, bool> ended;
};

inline SamplingParams greedy(int max_tokens = 20) {
  SamplingParams p;
  p.temperature = 0;
  p.max_tokens = max_tokens;
  p.ignore_eos = true;
  return p;
}

inline Tokens random_prompt(std::mt19937& random, std::size_t length, const Tokens& prefix = {}) {
  Tokens prompt = prefix;
  prompt.resize(std::min(prefix.size(), length));
  while (prompt.size() < length) prompt.push_back(static_cast<std::int32_t>(1 + random() % 90));
  return prompt;
}

// What the fake model continues with, without engine, cache or scheduler.
inline Tokens continuation(const Tokens& prompt, int count) {
  FakeModel fake;
  fake.allocate_cache(64);
  Tokens table(64), tokens = prompt;
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(63 - i);
  std::vector<float> logits(FakeModel::kVocabSize);
  for (int i = 0; i < count; ++i) {
    const auto n = static_cast<std::int32_t>(tokens.size());
    const Tokens starts = {0, n}, lengths = {n}, rows = {n - 1};
    model::ForwardBatch batch;
    batch.token_ids = tokens;
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = table;
    batch.max_blocks = 64;
    batch.logit_rows = rows;
    fake.forward(batch, logits.data(), nullptr);
    tokens.push_back(
        static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  return {tokens.begin() + static_cast<std::ptrdiff_t>(prompt.size()), tokens.end()};
}

// One load under many settings: whole and chunked prompts, batched and alone, with and without prefix reuse
// and preemption. Everybody must get the same tokens.
class Load {
 public:
  Load() {
    std::mt19937 random(11);
    const Tokens common = random_prompt(random, 300);
    for (int i = 0; i < 24; ++i) {
      const std::size_t length = 1 + random() % 400;
      prompts.push_back(random_prompt(random, length, i % 3 == 0 ? Tokens{} : common));
      SamplingParams p = greedy(1 + static_cast<int>(random() % 120));
      if (i % 2 == 1) {
        p.temperature = 0.8;
        p.seed = static_cast<std::uint64_t>(i);
        p.top_p = 0.9;
        p.frequency_penalty = i % 4 == 1 ? 0.5 : 0;
        p.n = i % 4 == 3 ? 3 : 1;
      }
      params.push_back(p);
    }
  }

  std::vector<std::map<int, Tokens>> run(const EngineOptions& options, int stagger,
                                         EngineStats* stats = nullptr) {
    Harness h(options);
    std::vector<RequestId> ids;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      ids.push_back(h.submit(prompts[i], params[i]));
      for (int k = 0; k < stagger; ++k) h.core->step();
      if (stagger < 0) h.run();
    }
    h.run();
    std::vector<std::map<int, Tokens>> out;
    for (const RequestId id : ids) {
      EXPECT_TRUE(h.ended[id]);
      auto& tokens = out.emplace_back();
      for (const auto& [index, result] : h.results[id]) {
        EXPECT_EQ(result.finish, FinishReason::kLength) << result.error;
        tokens[index] = result.tokens;
      }
    }
    if (stats != nullptr) *stats = h.core->stats();
    return out;
  }

  std::vector<Tokens> prompts;
  std::vector<SamplingParams> params;
};

}  // namespace flash_mla::engine
