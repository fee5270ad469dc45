#include "engine/speculation.h"

#include <gtest/gtest.h>

#include "engine/step_time.h"
#include "flash_mla/error.h"
#include "harness.h"
#include "sanitized.h"
#include "scenario.h"

namespace flash_mla::engine {
namespace {

using Speculative = EngineOptions::Speculative;
using Texts = std::map<std::pair<RequestId, int>, Tokens>;

// Knows how every continuation goes on, and says so, says something else, or now this, now that.
class Oracle : public Drafter {
 public:
  enum class Says { kTruth, kLies, kEither };
  Oracle(Texts texts, Says says) : texts_(std::move(texts)), says_(says) {}

  std::vector<std::int32_t> draft(const Continuation& c, int count) override {
    const Tokens& text = texts_[{c.request->id, c.index}];
    const auto known = static_cast<std::int64_t>(text.size());
    if (says_ == Says::kEither) count = static_cast<int>(random_() % static_cast<unsigned>(count + 1));
    std::vector<std::int32_t> out;
    for (std::int64_t i = c.num_generated; i < known && std::ssize(out) < count; ++i) {
      const bool lie = says_ == Says::kLies || (says_ == Says::kEither && random_() % 3 == 0);
      const std::int32_t token = text[static_cast<std::size_t>(i)];
      out.push_back(lie ? (token + 1) % 90 : token);
    }
    return out;
  }

 private:
  Texts texts_;
  Says says_;
  std::mt19937 random_{5};
};

Texts texts_of(const std::vector<Scenario::Outcome>& outcomes) {
  Texts out;
  for (std::size_t i = 0; i < outcomes.size(); ++i) {
    for (const auto& [index, result] : outcomes[i].results) out[{i + 1, index}] = result.tokens;
  }
  return out;
}

TEST(Speculation, ChangesNoText) {
  constexpr unsigned kSeeds = unless_sanitized(24U, 4U);
  std::int64_t ngrams = 0, tried = 0, unpaid = 0;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(seed);
    Scenario scenario(seed);
    std::size_t flights = 0;
    EngineStats off, stats;
    const auto expected = scenario.run(FakeRuns::kAtOnce, true, &flights, &off);
    const Texts texts = texts_of(expected);
    EXPECT_EQ(off.ngram_drafts.steps, 0);
    scenario.options.draft_tokens = 1 + static_cast<int>(seed % kMaxDraftTokens);
    for (const FakeRuns runs : {FakeRuns::kAtOnce, FakeRuns::kEither}) {
      const auto run = [&](Speculative speculative, std::unique_ptr<Drafter> drafter) {
        scenario.options.speculative = speculative;
        expect_same(expected, scenario.run(runs, true, &flights, &stats, std::move(drafter)));
        return stats.ngram_drafts;
      };
      ngrams += run(Speculative::kNgram, nullptr).drafted;
      run(Speculative::kAuto, nullptr);
      const DraftStats truth =
          run(Speculative::kNgram, std::make_unique<Oracle>(texts, Oracle::Says::kTruth));
      // What a request gets that is cancelled or fails is a matter of time.
      EXPECT_GE(truth.accepted, truth.drafted * 9 / 10);
      tried += truth.drafted;
      const DraftStats lies = run(Speculative::kNgram, std::make_unique<Oracle>(texts, Oracle::Says::kLies));
      EXPECT_EQ(lies.accepted, 0);
      EXPECT_EQ(lies.tokens, lies.steps);
      run(Speculative::kNgram, std::make_unique<Oracle>(texts, Oracle::Says::kEither));
      const DraftStats adapted =
          run(Speculative::kAuto, std::make_unique<Oracle>(texts, Oracle::Says::kLies));
      EXPECT_EQ(adapted.accepted, 0);
      unpaid += lies.drafted - adapted.drafted;
    }
  }
  EXPECT_GT(ngrams, kSeeds * 4);
  EXPECT_GT(tried, kSeeds * 400);
  EXPECT_GT(unpaid, 0) << "auto drafts no less where no draft is accepted";
}

TEST(Speculation, TheTruthIsAlwaysAcceptedAndLiesNever) {
  Harness::runs = FakeRuns::kAtOnce;
  EngineOptions o = Harness::defaults();
  const Tokens prompt = {5, 6, 7};
  Harness off(o);
  const Result expected = off.generate(prompt, greedy(150));
  const EngineStats plain = off.core->stats();
  o.speculative = Speculative::kNgram;
  o.draft_tokens = 4;
  const Texts texts = {{{1, 0}, expected.tokens}};

  Harness truth(o, 4096, std::make_unique<Oracle>(texts, Oracle::Says::kTruth));
  EXPECT_EQ(truth.generate(prompt, greedy(150)).tokens, expected.tokens);
  const EngineStats right = truth.core->stats();
  EXPECT_EQ(right.ngram_drafts.accepted, right.ngram_drafts.drafted);
  // The first token is the prompt's; then five a step.
  EXPECT_EQ(right.steps, 1 + 30);
  EXPECT_EQ(right.ngram_drafts.tokens, 149);
  EXPECT_EQ(right.ngram_drafts.steps, 30);

  Harness lies(o, 4096, std::make_unique<Oracle>(texts, Oracle::Says::kLies));
  EXPECT_EQ(lies.generate(prompt, greedy(150)).tokens, expected.tokens);
  const EngineStats wrong = lies.core->stats();
  EXPECT_EQ(wrong.ngram_drafts.accepted, 0);
  EXPECT_GT(wrong.ngram_drafts.drafted, 4 * 140);
  EXPECT_EQ(wrong.steps, plain.steps);

  for (const EngineStats& s : {right, wrong}) {  // drafts leave no trace
    EXPECT_EQ(s.computed_tokens, plain.computed_tokens);
    EXPECT_EQ(s.generated_tokens, plain.generated_tokens);
    EXPECT_EQ(s.pages_cached, plain.pages_cached);
    EXPECT_EQ(s.pages_evicted, 0);
  }
}

TEST(Speculation, AModuleGoesOverEveryTokenAndChangesNoText) {
  DraftStats all;
  for (unsigned seed = 0; seed < 8; ++seed) {
    SCOPED_TRACE(seed);
    Scenario scenario(seed);
    std::size_t flights = 0;
    EngineStats stats;
    Harness::has_module = false;
    const auto expected = scenario.run(FakeRuns::kAtOnce, true, &flights, &stats);
    Harness::has_module = true;
    scenario.options.draft_tokens = 1 + static_cast<int>(seed % 5);
    for (const FakeRuns runs : {FakeRuns::kAtOnce, FakeRuns::kLate}) {
      for (const Speculative speculative : {Speculative::kMtp, Speculative::kAuto}) {
        scenario.options.speculative = speculative;
        expect_same(expected, scenario.run(runs, true, &flights, &stats));
        // What ends or is preempted leaves pages to others that the module has not gone over; and with `auto` it is
        // not asked where it does not pay.
        if (!scenario.options.prefix_cache && speculative == Speculative::kMtp) {
          EXPECT_EQ(scenario.module_gaps, 0);
        }
        if (speculative == Speculative::kMtp) {
          EXPECT_EQ(stats.ngram_drafts.drafted, 0);
        }
        all.drafted += stats.mtp_drafts.drafted;
        all.accepted += stats.mtp_drafts.accepted;
      }
      scenario.options.speculative = Speculative::kNgram;
      expect_same(expected, scenario.run(runs, true, &flights, &stats));
      EXPECT_EQ(stats.mtp_drafts.drafted, 0);
    }
    Harness::has_module = false;
  }
  EXPECT_GT(all.accepted, 300);
  EXPECT_GT(all.drafted, all.accepted);
}

TEST(Speculation, AModelWithoutAModuleIsRefused) {
  EngineOptions o = Harness::defaults();
  o.speculative = Speculative::kMtp;
  EXPECT_THROW(Harness{o}, InvalidArgument);
  o.speculative = Speculative::kAuto;  // n-grams then
  Harness h(o);
  EXPECT_EQ(h.generate({5, 6, 7}, greedy(20)).tokens, continuation({5, 6, 7}, 20));
}

TEST(Speculation, DraftsTakeNoPageThatIsOfUse) {
  Harness::runs = FakeRuns::kAtOnce;
  EngineOptions o = Harness::defaults();
  o.num_pages = 4;
  o.speculative = Speculative::kNgram;
  o.draft_tokens = kMaxDraftTokens;
  Harness h(o, 4096, std::make_unique<Oracle>(Texts{{{2, 0}, Tokens(40, 1)}}, Oracle::Says::kTruth));
  std::mt19937 random(4);
  h.generate(random_prompt(random, 150), greedy(1));  // two full pages stay in the prefix cache
  ASSERT_EQ(h.core->stats().pages_cached, 2);
  // Up to the end of its second page; drafts would reach into a third.
  h.generate(random_prompt(random, 100), greedy(28));
  EXPECT_EQ(h.core->stats().pages_evicted, 0);
}

TEST(Speculation, OptionsOutOfRangeAreNamed) {
  EngineOptions o = Harness::defaults();
  for (const int drafts : {-1, 0, kMaxDraftTokens + 1}) {
    o.draft_tokens = drafts;
    try {
      Harness h(o);
      ADD_FAILURE() << drafts;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("draft_tokens is " + std::to_string(drafts)), std::string::npos)
          << e.what();
    }
  }
}

TEST(NgramDraft, GoesOnAsBefore) {
  EXPECT_EQ(ngram_draft(Tokens{1, 2, 3, 4, 9, 1, 2}, 3), (Tokens{3, 4, 9}));
  EXPECT_EQ(ngram_draft(Tokens{1, 2, 3, 4, 9, 1, 2}, 1), Tokens{3});
  EXPECT_EQ(ngram_draft(Tokens{7, 1, 2, 5, 8, 1, 2, 6, 1, 2}, 1), Tokens{6}) << "the latest";
  EXPECT_EQ(ngram_draft(Tokens{7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2}, 1), Tokens{5}) << "the longest";
  EXPECT_EQ(ngram_draft(Tokens{4, 5, 6, 4, 5, 6, 4, 5}, 7), (Tokens{6, 4, 5, 6, 4, 5, 6})) << "into itself";
  EXPECT_EQ(ngram_draft(Tokens{3, 3, 3}, 4), (Tokens{3, 3, 3, 3}));
  EXPECT_TRUE(ngram_draft(Tokens{1, 2, 3, 4, 2}, 3).empty()) << "one token is not enough";
  EXPECT_TRUE(ngram_draft(Tokens{}, 3).empty());
  EXPECT_TRUE(ngram_draft(Tokens{1}, 3).empty());
}

TEST(StepTime, IsFittedToTheLatestSteps) {
  StepTime time;
  EXPECT_EQ(time.at(3), 0);
  EXPECT_EQ(time.slope(), 0);
  time.add(2, 0.2);
  EXPECT_GT(time.slope(), 0) << "nobody has seen another size";
  EXPECT_NEAR(time.at(2), 0.2, 1e-12);
  for (int i = 0; i < 50; ++i) time.add(1 + i % 8, 0.5 + 0.01 * (1 + i % 8));
  for (int i = 0; i < 400; ++i) time.add(1 + i % 8, 1 + 0.1 * (1 + i % 8));
  EXPECT_NEAR(time.slope(), 0.1, 0.01);
  EXPECT_NEAR(time.at(4), 1.4, 0.02);
}

}  // namespace
}  // namespace flash_mla::engine
