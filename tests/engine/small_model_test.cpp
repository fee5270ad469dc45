// Drafts on a real model: models/small, with whatever a request can ask for.

#include <gtest/gtest.h>

#include <cstddef>
#include <random>
#include <string>
#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla {
namespace {

using Speculative = EngineOptions::Speculative;

EngineOptions options(Speculative speculative) {
  EngineOptions o;
  o.device = EngineOptions::Device::kCpu;
  o.batch_invariant = true;
  o.num_pages = 64;
  o.max_batch_size = 12;
  o.max_tokens_per_step = 96;
  o.num_threads = 1;
  o.speculative = speculative;
  o.draft_tokens = 4;
  return o;
}

std::vector<Request> requests(int count) {
  const std::vector<std::string> openings = {"And it came to pass",
                                             "CHAPTER I\n\nEmma was",
                                             "And the sons of",
                                             "In the beginning",
                                             "Blessed are the",
                                             "And he said unto them, And he said unto them, And",
                                             "one two three one two three one two"};
  std::mt19937 random(7);
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  std::vector<Request> out;
  for (int i = 0; i < count; ++i) {
    Request& r = out.emplace_back();
    for (unsigned k = 0, parts = 1 + random() % 4; k < parts; ++k) {
      r.prompt += openings[random() % openings.size()] + (k + 1 < parts ? ", " : "");
    }
    SamplingParams& p = r.sampling;
    p.max_tokens = 1 + static_cast<int>(random() % 40);
    p.temperature = std::vector<double>{0, 0.3, 1}[random() % 3];
    p.seed = random();
    p.ignore_eos = one_in(2);
    if (one_in(3)) p.top_p = 0.9;
    if (one_in(4)) p.top_k = 20;
    if (one_in(5)) p.min_p = 0.02;
    if (one_in(5)) p.repetition_penalty = 1.1;
    if (one_in(6)) p.frequency_penalty = 0.4;
    if (one_in(6)) p.presence_penalty = 0.4;
    if (one_in(5)) p.stop = {"the", "\n"};
    if (one_in(6)) p.logprobs = 2;
    if (one_in(8)) p.prompt_logprobs = 1;
    if (one_in(6)) p.min_tokens = p.max_tokens / 2;
    if (one_in(8)) p.logit_bias = {{static_cast<std::int32_t>(random() % 4096), 4}};
    if (one_in(8)) p.bad_words = {"and", "of"};
    if (one_in(8)) p.n = 2;
    if (FLASH_MLA_HAS_FORMATS && p.stop.empty() && one_in(5)) {
      p.format.kind = TextFormat::Kind::kRegex;
      p.format.source = "( [a-z]{2,8}){3,12}\\.";
    }
  }
  return out;
}

TEST(SmallModel, DraftsChangeNoText) {
  const std::vector<Request> all = requests(24);
  const std::vector<Completion> expected =
      Engine(FLASH_MLA_SMALL_MODEL, options(Speculative::kOff)).generate(all);
  for (const Speculative speculative : {Speculative::kNgram, Speculative::kMtp, Speculative::kAuto}) {
    SCOPED_TRACE(static_cast<int>(speculative));
    Engine engine(FLASH_MLA_SMALL_MODEL, options(speculative));
    const std::vector<Completion> out = engine.generate(all);
    for (std::size_t i = 0; i < all.size(); ++i) {
      SCOPED_TRACE(i);
      EXPECT_EQ(expected[i].usage.completion_tokens, out[i].usage.completion_tokens);
      EXPECT_EQ(expected[i].usage.prompt_tokens, out[i].usage.prompt_tokens);
      ASSERT_EQ(expected[i].choices.size(), out[i].choices.size());
      for (std::size_t k = 0; k < out[i].choices.size(); ++k) {
        const Completion::Choice &a = expected[i].choices[k], &b = out[i].choices[k];
        EXPECT_EQ(a.token_ids, b.token_ids);
        EXPECT_EQ(a.text, b.text);
        EXPECT_EQ(a.finish, b.finish);
        EXPECT_EQ(a.error, b.error);
        ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
        for (std::size_t t = 0; t < a.logprobs.size(); ++t) {
          EXPECT_EQ(a.logprobs[t].chosen.logprob, b.logprobs[t].chosen.logprob);
        }
      }
    }
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.pages_used, 0);
    EXPECT_EQ(stats.failed, 0);
    if (speculative == Speculative::kAuto) continue;  // whether drafts pay is a matter of time
    const DraftStats& drafts = speculative == Speculative::kNgram ? stats.ngram_drafts : stats.mtp_drafts;
    EXPECT_GT(drafts.accepted, 25);
    EXPECT_LT(drafts.accepted, drafts.drafted);
  }
}

}  // namespace
}  // namespace flash_mla
