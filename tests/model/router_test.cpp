#include "kernels/moe/cpu/router.h"

#include <gmock/gmock.h>

#include <cmath>
#include <vector>

namespace flash_mla::cpu {
namespace {

using testing::ElementsAre;
using testing::FloatNear;

struct Choice {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

Choice choose(const Routing& config, const std::vector<float>& logits, const std::vector<float>& bias = {}) {
  Choice out;
  out.ids.resize(static_cast<std::size_t>(config.experts_per_token));
  out.weights.resize(out.ids.size());
  choose_experts(config, logits.data(), bias.empty() ? nullptr : bias.data(), out.ids.data(),
                 out.weights.data());
  return out;
}

Routing routing(TopkMethod method, ScoringFunc scoring, int experts, int chosen) {
  Routing config;
  config.method = method;
  config.scoring = scoring;
  config.num_experts = experts;
  config.experts_per_token = chosen;
  return config;
}

auto near(double x) { return FloatNear(static_cast<float>(x), 1e-6f); }

TEST(Router, GreedyTakesTheBestOfTheSoftmax) {
  const Routing config = routing(TopkMethod::kGreedy, ScoringFunc::kSoftmax, 4, 2);
  const Choice choice = choose(config, {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(3.0f)});
  EXPECT_THAT(choice.ids, ElementsAre(1, 3));
  EXPECT_THAT(choice.weights, ElementsAre(near(0.4), near(0.3)));
}

TEST(Router, LargeLogitsDoNotOverflow) {
  const Routing config = routing(TopkMethod::kGreedy, ScoringFunc::kSoftmax, 2, 1);
  EXPECT_THAT(choose(config, {1000.0f, 900.0f}).weights, ElementsAre(near(1)));
}

TEST(Router, EqualScoresGoToTheLowerIndex) {
  const Routing config = routing(TopkMethod::kGreedy, ScoringFunc::kSoftmax, 4, 2);
  EXPECT_THAT(choose(config, {0, 0, 0, 0}).ids, ElementsAre(0, 1));
}

TEST(Router, GroupsAreLimitedByTheirBestExpert) {
  Routing config = routing(TopkMethod::kGroupLimitedGreedy, ScoringFunc::kSoftmax, 6, 2);
  config.num_groups = 3;
  config.groups_kept = 1;
  config.scale = 16;
  // Group 1 holds the best expert; the second best of all, in group 0, is out.
  const Choice choice = choose(config, {3, 3, 4, 0, 2, 2});
  EXPECT_THAT(choice.ids, ElementsAre(2, 3));
  const double sum = 2 * std::exp(3) + std::exp(4) + 1 + 2 * std::exp(2);
  EXPECT_THAT(choice.weights, ElementsAre(FloatNear(static_cast<float>(16 * std::exp(4) / sum), 1e-5f),
                                          FloatNear(static_cast<float>(16 / sum), 1e-5f)));
}

TEST(Router, BiasChoosesAndDoesNotWeigh) {
  Routing config = routing(TopkMethod::kNoAuxTc, ScoringFunc::kSigmoid, 4, 2);
  config.num_groups = 2;
  config.groups_kept = 1;
  config.normalise = true;
  config.scale = 2.5;
  const std::vector<float> logits = {2, 0, 1, 0.5f};
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  // Sums of two: 0.881 + 0.5 against 0.731 + 0.622.
  EXPECT_THAT(choose(config, logits, {0, 0, 0, 0}).ids, ElementsAre(0, 1));
  const Choice choice = choose(config, logits, {0, 0, 0.1f, 0.3f});
  EXPECT_THAT(choice.ids, ElementsAre(3, 2));
  const double sum = sigmoid(0.5) + sigmoid(1);
  EXPECT_THAT(choice.weights, ElementsAre(near(2.5 * sigmoid(0.5) / sum), near(2.5 * sigmoid(1) / sum)));
}

}  // namespace
}  // namespace flash_mla::cpu
