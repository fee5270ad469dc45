#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "base/philox.h"
#include "flash_mla/error.h"
#include "kernels/sampling/draw_weight.h"
#include "sanitized.h"

namespace flash_mla::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Sampled sample(const SamplingParams& params, std::vector<float> logits, std::uint64_t seed = 1,
               std::uint64_t position = 0, std::vector<std::int32_t> prompt = {},
               std::vector<std::int32_t> generated = {}) {
  Sampler sampler;
  TokenHistory history(params, prompt);
  for (const std::int32_t token : generated) history.add(token);
  return sampler.sample(params, history, {seed, 0, position}, logits);
}

SamplingParams greedy() {
  SamplingParams p;
  p.temperature = 0;
  return p;
}

TEST(Philox, KnownAnswers) {
  // Published with Random123 (kat_vectors, philox4x32 10).
  using C = std::array<std::uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (C{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}), (C{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (C{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Sampler, GreedyTakesTheFirstOfEquals) {
  EXPECT_EQ(sample(greedy(), {1, 3, 2, 3}).token, 1);
  EXPECT_EQ(sample(greedy(), {-kInf, -kInf, -1e30f}).token, 2);
}

TEST(Sampler, NearlyZeroTemperatureIsGreedy) {
  for (const double t : {1e-3, 1e-12, 1e-38, 1e-300}) {
    SamplingParams p;
    p.temperature = t;
    for (std::uint64_t seed = 0; seed < 20; ++seed)
      EXPECT_EQ(sample(p, {1, 3, 2, -kInf}, seed).token, 1) << t;
  }
}

TEST(Sampler, BadLogitsAreErrors) {
  for (const SamplingParams& p : {greedy(), SamplingParams()}) {
    EXPECT_THROW(sample(p, {1, kNaN, 2}), BadLogits);
    EXPECT_THROW(sample(p, {kNaN, kNaN}), BadLogits);
    EXPECT_THROW(sample(p, {1, kInf}), BadLogits);
    EXPECT_THROW(sample(p, {-kInf, -kInf}), BadLogits);
    EXPECT_NO_THROW(sample(p, {3e38f, -3e38f}));
  }
  try {
    sample(greedy(), {1, 2, kNaN});
    FAIL();
  } catch (const BadLogits& e) {
    EXPECT_NE(std::string(e.what()).find("token 2"), std::string::npos) << e.what();
  }
}

TEST(Sampler, DependsOnSeedIndexAndPositionOnly) {
  const std::vector<float> logits(1000, 0.0f);
  SamplingParams p;
  Sampler used, fresh;
  const TokenHistory history(p, {});
  std::map<std::int32_t, int> seen;
  for (std::uint64_t i = 0; i < 50; ++i) {
    std::vector<float> a = logits, b = logits;
    const std::int32_t token = used.sample(p, history, {i % 5, 0, i}, a).token;
    EXPECT_EQ(token, Sampler().sample(p, history, {i % 5, 0, i}, b).token);
    ++seen[token];
  }
  EXPECT_GT(seen.size(), 30u);
  EXPECT_NE(uniform(1, 0, 5), uniform(1, 1, 5));
  EXPECT_NE(uniform(1, 0, 5), uniform(2, 0, 5));
  EXPECT_NE(uniform(1, 0, 5), uniform(1u + (1ull << 32), 0, 5));
}

// The distribution that the documentation promises, by definition rather than by algorithm.
std::vector<double> exact(const SamplingParams& p, const std::vector<float>& logits) {
  std::vector<double> w(logits.size());
  const double largest = *std::max_element(logits.begin(), logits.end());
  for (std::size_t i = 0; i < w.size(); ++i) w[i] = std::exp((logits[i] - largest) / p.temperature);
  for (double& x : w) x = x >= p.min_p ? x : 0;
  std::vector<std::size_t> order(w.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  if (p.top_k > 0) {
    for (std::size_t i = static_cast<std::size_t>(p.top_k); i < order.size(); ++i) w[order[i]] = 0;
  }
  const double total = std::accumulate(w.begin(), w.end(), 0.0);
  double sum = 0;
  for (const std::size_t i : order) {
    if (p.top_p < 1 && sum >= p.top_p * total) w[i] = 0;
    sum += w[i];
  }
  const double norm = std::accumulate(w.begin(), w.end(), 0.0);
  for (double& x : w) x /= norm;
  return w;
}

// Pearson's statistic against the exact distribution; rare tokens are pooled. Tokens of probability 0 must
// not occur at all.
void expect_distribution(const SamplingParams& p, const std::vector<float>& logits, int draws) {
  const std::vector<double> probability = exact(p, logits);
  std::vector<int> counts(logits.size(), 0);
  Sampler sampler;
  const TokenHistory history(p, {});
  for (int i = 0; i < draws; ++i) {
    std::vector<float> row = logits;
    ++counts[static_cast<std::size_t>(
        sampler.sample(p, history, {20, 0, static_cast<std::uint64_t>(i)}, row).token)];
  }
  double statistic = 0, pooled_p = 0;
  int cells = 0, pooled = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (probability[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i << " should have been filtered out";
    } else if (probability[i] * draws < 10) {
      pooled_p += probability[i];
      pooled += counts[i];
    } else {
      const double expected = probability[i] * draws;
      statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
      ++cells;
    }
  }
  if (pooled_p * draws >= 10) {
    statistic += std::pow(pooled - pooled_p * draws, 2) / (pooled_p * draws);
    ++cells;
  }
  // Wilson-Hilferty: (chi2 / k)^(1/3) is nearly normal. 4.5 sigma: wrong once in 300,000 runs, but the draws
  // are fixed by the seed, so it is wrong always or never.
  const double k = std::max(1, cells - 1);
  const double z = (std::cbrt(statistic / k) - (1 - 2 / (9 * k))) / std::sqrt(2 / (9 * k));
  EXPECT_LT(z, 4.5) << "chi2 " << statistic << " with " << k << " degrees of freedom";
}

TEST(Sampler, DrawsFollowTheExactDistribution) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(300);
  for (float& x : logits) x = normal(random);
  for (std::size_t i = 0; i < 20; ++i) logits[i * 7] = -kInf;
  for (std::size_t i = 0; i < 30; ++i) logits[i * 9 + 1] = 2.5f;  // ties across every cut

  const auto with = [](double t, int k, double top_p, double min_p) {
    SamplingParams p;
    p.temperature = t;
    p.top_k = k;
    p.top_p = top_p;
    p.min_p = min_p;
    return p;
  };
  for (const SamplingParams& p :
       {with(1, 0, 1, 0), with(0.5, 0, 1, 0), with(3, 0, 1, 0), with(1, 1, 1, 0), with(1, 10, 1, 0),
        with(1, 299, 1, 0), with(1, 1000, 1, 0), with(1, 0, 0.9, 0), with(1, 0, 0.5, 0), with(1, 0, 1e-6, 0),
        with(2, 0, 0.999, 0), with(1, 0, 1, 0.1), with(1, 0, 1, 0.9), with(1, 50, 0.8, 0.05),
        with(0.7, 40, 0.95, 0.01)}) {
    SCOPED_TRACE(::testing::Message() << "temperature " << p.temperature << ", top_k " << p.top_k
                                      << ", top_p " << p.top_p << ", min_p " << p.min_p);
    expect_distribution(p, logits, unless_sanitized(40000, 4000));
  }
}

TEST(Draw, WeightsAreThoseOfTheExponential) {
  EXPECT_EQ(draw_weight(0, 1), kDrawOne);
  EXPECT_EQ(draw_weight(-0.0f, 1e30f), kDrawOne);
  EXPECT_EQ(draw_weight(-kInf, 1), 0u);
  EXPECT_EQ(draw_weight(-1, 1e30f), 0u);
  EXPECT_EQ(draw_weight(-32, 1), 0u);
  double worst = 0;
  std::uint64_t before = kDrawOne;
  for (float x = 0; x < 31; x += 1.0f / 4096) {
    const std::uint64_t w = draw_weight(-x, 1);
    const double expected = std::exp(-static_cast<double>(x)) * static_cast<double>(kDrawOne);
    // One unit is lost where weights are so small that they have fewer than 24 bits.
    worst = std::max(worst, (std::abs(static_cast<double>(w) - expected) - 1) / expected);
    EXPECT_LE(w, before);
    before = w;
  }
  EXPECT_LT(worst, 4e-7);
}

TEST(Draw, EqualLogitsAreDrawnByTheSmallerId) {
  cpu::DrawScratch scratch;
  const std::vector<float> logits = {1, 2, 2, 2, 1};
  EXPECT_EQ(cpu::draw_token(logits, 2, cpu::make_draw(0.99, 1, 2, 1, 0), scratch), 2);
  EXPECT_EQ(cpu::draw_token(logits, 2, cpu::make_draw(0.0, 1, 2, 1, 0), scratch), 1);
  EXPECT_EQ(cpu::draw_token(logits, 2, cpu::make_draw(0.99, 1, 0, 1, 0.5), scratch), 3);
  EXPECT_EQ(cpu::draw_token(logits, 2, cpu::make_draw(0.99, 1, 0, 1, 0), scratch), 4);
  EXPECT_EQ(cpu::draw_token(logits, 2, cpu::make_draw(0.99, 1, 0, 1e-9, 0), scratch), 1);
}

TEST(Sampler, TheTestAboveSeesAWrongDistribution) {
  std::vector<float> logits = {0, 0.1f, 0.2f, 0.3f};
  SamplingParams p;
  const std::vector<double> probability = exact(p, {0, 0.15f, 0.2f, 0.3f});
  // 5 % off in one weight must be visible at the number of draws used.
  const std::vector<double> right = exact(p, logits);
  double expected_statistic = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    expected_statistic += 40000 * std::pow(probability[i] - right[i], 2) / right[i];
  }
  EXPECT_GT(expected_statistic, 16);
}

TEST(Sampler, Penalties) {
  SamplingParams p = greedy();
  p.repetition_penalty = 2;
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, /*prompt=*/{0}).token, 1);
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, {}, /*generated=*/{0}).token, 1);
  EXPECT_EQ(sample(p, {-1, -1.5f, -9}, 1, 0, {0}).token, 1) << "negative logits are multiplied";
  p = greedy();
  p.frequency_penalty = 0.6;
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, {0, 0, 0, 0}).token, 0) << "the prompt does not count";
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, {}, {0}).token, 0);
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, {}, {0, 0}).token, 1);
  p = greedy();
  p.presence_penalty = 0.6;
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, {}, {0, 0, 0, 0}).token, 0) << "once, however often";
  p.presence_penalty = 1.5;
  EXPECT_EQ(sample(p, {4, 3, 1}, 1, 0, {}, {0}).token, 1);
  p.repetition_penalty = 1.5;
  EXPECT_EQ(sample(p, {-kInf, -kInf, 1}, 1, 0, {0}, {1, 2}).token, 2) << "excluded tokens stay excluded";
}

TEST(Sampler, LogprobsAreTheModelsOwn) {
  SamplingParams p;
  p.logprobs = 2;
  p.temperature = 0.3;
  p.top_k = 1;
  p.presence_penalty = 1;
  const Sampled s = sample(p, {std::log(0.5f), std::log(0.2f), std::log(0.3f), -kInf}, 1, 0, {}, {0});
  EXPECT_EQ(s.token, 2);
  EXPECT_EQ(s.logprobs.chosen.token, 2);
  EXPECT_NEAR(s.logprobs.chosen.logprob, std::log(0.3), 1e-6);
  ASSERT_EQ(s.logprobs.top.size(), 2u);
  EXPECT_EQ(s.logprobs.top[0].token, 0);
  EXPECT_NEAR(s.logprobs.top[0].logprob, std::log(0.5), 1e-6);
  EXPECT_EQ(s.logprobs.top[1].token, 2);
  p.logprobs = 20;
  EXPECT_EQ(sample(p, {1, 2, 3}).logprobs.top.size(), 3u);
  p.logprobs = 0;
  EXPECT_TRUE(sample(p, {1, 2, 3}).logprobs.top.empty());
  EXPECT_EQ(sample(p, {1, 2, 3}).logprobs.chosen.token, 2);
}

TEST(SamplingParams, ErrorsNameTheField) {
  const auto expect_refused = [](const char* field, const std::function<void(SamplingParams&)>& change) {
    SamplingParams p;
    change(p);
    try {
      validate(p);
      ADD_FAILURE() << field << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(std::string(e.what()).rfind(std::string(field) + " is ", 0), 0u) << e.what();
      EXPECT_NE(std::string(e.what()).find("expected"), std::string::npos) << e.what();
    }
  };
  EXPECT_NO_THROW(validate(SamplingParams()));
  const double nan = std::nan("");
  expect_refused("max_tokens", [](auto& p) { p.max_tokens = 0; });
  expect_refused("n", [](auto& p) { p.n = 0; });
  expect_refused("temperature", [](auto& p) { p.temperature = -0.1; });
  expect_refused("temperature", [&](auto& p) { p.temperature = nan; });
  expect_refused("top_p", [](auto& p) { p.top_p = 0; });
  expect_refused("top_p", [](auto& p) { p.top_p = 1.1; });
  expect_refused("top_p", [&](auto& p) { p.top_p = nan; });
  expect_refused("top_k", [](auto& p) { p.top_k = -1; });
  expect_refused("min_p", [](auto& p) { p.min_p = 1; });
  expect_refused("repetition_penalty", [](auto& p) { p.repetition_penalty = 0; });
  expect_refused("frequency_penalty", [](auto& p) { p.frequency_penalty = 2.5; });
  expect_refused("presence_penalty", [&](auto& p) { p.presence_penalty = nan; });
  expect_refused("logprobs", [](auto& p) { p.logprobs = 21; });
  expect_refused("stop", [](auto& p) { p.stop = {"a", ""}; });
  expect_refused("stop_token_ids", [](auto& p) { p.stop_token_ids = {-1}; });
}

}  // namespace
}  // namespace flash_mla::engine
