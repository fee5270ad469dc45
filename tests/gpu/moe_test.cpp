// Routing against the CPU's router, the experts against fp64 sums on the host.

#include "kernels/moe/sm90/moe.h"

#include <gtest/gtest.h>

#include <string>

#include "experts.h"
#include "kernels/moe/cpu/router.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

using sm90::ExpertFfn;
using sm90::RouteArgs;

// ---- Routing

struct Kind {
  const char* name;
  int experts, chosen, groups, kept;
  ScoringFunc scoring;
  TopkMethod method;
  bool correction, normalise;
  double scale;
};

const Kind kKinds[] = {
    {"V2Lite", 64, 6, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false, false, 1.0},
    {"V2", 160, 6, 8, 3, ScoringFunc::kSoftmax, TopkMethod::kGroupLimitedGreedy, false, false, 16.0},
    {"V3", 256, 8, 8, 4, ScoringFunc::kSigmoid, TopkMethod::kNoAuxTc, true, true, 2.5},
    {"SoftmaxNormalised", 48, 4, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false, true, 1.0},
    {"SigmoidGreedy", 300, 32, 1, 1, ScoringFunc::kSigmoid, TopkMethod::kGreedy, true, false, 0.5},
    {"Small", 8, 2, 2, 1, ScoringFunc::kSigmoid, TopkMethod::kNoAuxTc, true, true, 1.0},
    {"One", 1, 1, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false, false, 1.0},
    {"Most", 512, 16, 32, 8, ScoringFunc::kSoftmax, TopkMethod::kGroupLimitedGreedy, false, false, 1.0},
};

RouteArgs arguments(const Kind& k) {
  RouteArgs a;
  a.routing = {k.experts, k.chosen, 0, k.groups, k.kept, k.scoring, k.method, k.normalise, float(k.scale)};
  return a;
}

class Routing : public testing::TestWithParam<Kind> {};

TEST_P(Routing, ChoosesAsTheCpuDoes) {
  const Kind& kind = GetParam();
  Random random(23);
  for (const bool ties : {false, true}) {
    for (const int tokens : {1, 3, 200}) {
      std::vector<float> logits = random.fp32(std::size_t(tokens) * kind.experts, 1.0f);
      std::vector<float> bias = random.fp32(std::size_t(kind.experts), 0.1f);
      if (ties) {  // few values, so that most are equal
        for (float& v : logits) v = std::round(v * 2) / 2;
        std::fill(bias.begin(), bias.end(), 0.25f);
      }
      const OnDevice<float> bias_device(bias);
      OnDevice<float> logits_device(logits);
      OnDevice<std::int32_t> ids(std::size_t(tokens) * kind.chosen);
      OnDevice<float> weights(std::size_t(tokens) * kind.chosen);
      RouteArgs a = arguments(kind);
      a.correction = kind.correction ? bias_device.get() : nullptr;
      a.logits = logits_device.get();
      a.ids = ids.get();
      a.weights = weights.get();
      a.tokens = tokens;
      check(sm90::choose_experts(a, nullptr), "choose_experts");
      const std::vector<std::int32_t> got_ids = ids.host();
      const std::vector<float> got = weights.host();
      for (int t = 0; t < tokens; ++t) {
        std::vector<std::int32_t> want_ids(std::size_t(kind.chosen));
        std::vector<float> want(std::size_t(kind.chosen));
        cpu::choose_experts(a.routing, logits.data() + std::size_t(t) * kind.experts,
                            kind.correction ? bias.data() : nullptr, want_ids.data(), want.data());
        for (int i = 0; i < kind.chosen; ++i) {
          const std::size_t at = std::size_t(t) * kind.chosen + i;
          ASSERT_EQ(got_ids[at], want_ids[std::size_t(i)])
              << "token " << t << " choice " << i << " ties " << ties;
          ASSERT_NEAR(got[at], want[std::size_t(i)], 1e-5f * std::abs(want[std::size_t(i)]) + 1e-12f);
        }
      }
    }
  }
}

TEST_P(Routing, NanNeverLeavesTheRange) {
  const Kind& kind = GetParam();
  std::vector<float> logits(std::size_t(3) * kind.experts, NAN);
  for (int e = 0; e < kind.experts; ++e) logits[std::size_t(kind.experts + e)] = e % 3 == 0 ? -NAN : float(e);
  OnDevice<float> logits_device(logits);
  OnDevice<std::int32_t> ids(std::size_t(3) * kind.chosen);
  OnDevice<float> weights(std::size_t(3) * kind.chosen);
  RouteArgs a = arguments(kind);
  a.logits = logits_device.get();
  a.ids = ids.get();
  a.weights = weights.get();
  a.tokens = 3;
  check(sm90::choose_experts(a, nullptr), "choose_experts");
  const std::vector<std::int32_t> got = ids.host();
  for (int t = 0; t < 3; ++t) {
    std::vector<bool> seen(std::size_t(kind.experts), false);
    for (int i = 0; i < kind.chosen; ++i) {
      const int e = got[std::size_t(t) * kind.chosen + i];
      ASSERT_TRUE(e >= 0 && e < kind.experts) << e;
      ASSERT_FALSE(seen[std::size_t(e)]) << "expert " << e << " twice";
      seen[std::size_t(e)] = true;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Moe, Routing, testing::ValuesIn(kKinds),
                         [](const auto& kind) { return std::string(kind.param.name); });

TEST(Router, LogitsKeepFp32Weights) {
  Random random(29);
  for (const int tokens : {1, 9, 70, 300}) {
    constexpr int kHidden = 1096, kExperts = 72;
    const std::vector<std::uint16_t> x = random.bf16(std::size_t(tokens) * kHidden, 1.0f);
    const std::vector<float> router = random.fp32(std::size_t(kExperts) * kHidden, 0.03f);
    const OnDevice<std::uint16_t> x_device(x);
    const OnDevice<float> router_device(router);
    OnDevice<float> logits(std::size_t(tokens) * kExperts), weights(std::size_t(tokens) * 6);
    OnDevice<std::int32_t> ids(std::size_t(tokens) * 6);
    RouteArgs a = arguments(kKinds[0]);
    a.routing.num_experts = kExperts;
    a.x = x_device.get();
    a.x_stride = a.hidden = kHidden;
    a.router = router_device.get();
    a.logits = logits.get();
    a.ids = ids.get();
    a.weights = weights.get();
    a.tokens = tokens;
    a.programmatic_launch = true;
    check(sm90::route(a, nullptr), "route");
    const std::vector<float> got = logits.host();
    const std::vector<std::int32_t> got_ids = ids.host();
    for (int t = 0; t < tokens; ++t) {
      for (int e = 0; e < kExperts; ++e) {
        double want = 0;
        for (int i = 0; i < kHidden; ++i) {
          want += double(from_bf16(x[std::size_t(t) * kHidden + i])) * router[std::size_t(e) * kHidden + i];
        }
        ASSERT_NEAR(got[std::size_t(t) * kExperts + e], want, 5e-6) << "token " << t << " expert " << e;
      }
      const auto first = got.begin() + std::int64_t(t) * kExperts;
      EXPECT_EQ(got_ids[std::size_t(t) * 6], std::max_element(first, first + kExperts) - first);
    }
  }
}

// ---- Experts

TEST(ExpertFfn, SmallAndOddShapes) {
  Random random(31);
  for (const Layer layer :
       {Layer{64, 48, 8, 2}, Layer{72, 40, 5, 3}, Layer{256, 136, 16, 4}, Layer{50, 30, 6, 2},
        Layer{64, 33, 4, 1}, Layer{8, 8, 1, 1}, Layer{328, 264, 300, 8}}) {
    for (const int tokens : {1, 2, 7, 40, 333, 2000}) {
      for (const int favourite : {-1, layer.experts - 1}) {
        Experts e(random, layer, tokens, favourite, tokens % 2 == 0 ? 16 : 0);
        e.args.programmatic_launch = random.coin();
        e.args.batch_invariant = random.coin();
        e.verify(e.run(e.args), some_tokens(random, tokens, 20),
                 (testing::Message() << "hidden " << layer.hidden << " tokens " << tokens).GetString());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(ExpertFfn, V2Lite) {
  Random random(37);
  for (const int tokens : {1, 3, 32, 128, 1500}) {
    Experts e(random, {2048, 1408, 12, 6}, tokens);
    e.args.programmatic_launch = true;
    e.verify(e.run(e.args), some_tokens(random, tokens, 3),
             (testing::Message() << "tokens " << tokens).GetString());
    if (HasFatalFailure()) return;
  }
}

// Few pairs for each expert, many, and a favourite of all tokens beside experts that nobody takes; the last two shapes
// are not for the fast path.
TEST(ExpertFfn, E4m3WeightsOfSmallAndOddShapes) {
  Random random(47);
  for (const Layer layer :
       {Layer{64, 48, 8, 2}, Layer{144, 80, 5, 3}, Layer{256, 144, 16, 4}, Layer{16, 16, 1, 1},
        Layer{336, 272, 300, 8}, Layer{72, 40, 5, 3}, Layer{50, 30, 6, 2}}) {
    for (const int tokens : {1, 2, 7, 40, 333, 2000}) {
      for (const int favourite : {-1, layer.experts - 1}) {
        Experts e(random, layer, tokens, favourite, tokens % 2 == 0 ? 16 : 0);
        const E4m3Experts weights(random, e, random.coin());
        e.args.programmatic_launch = random.coin();
        e.args.batch_invariant = random.coin();
        e.verify(e.run(e.args), some_tokens(random, tokens, 20),
                 (testing::Message() << "e4m3 hidden " << layer.hidden << " tokens " << tokens).GetString());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Every number of rows, by every kernel that takes them; where there are few, some experts are taken by nobody.
TEST(ExpertFfn, E4m3WeightsOfEveryRowCount) {
  Random random(53);
  for (int tokens = 1; tokens <= 300; ++tokens) {
    Experts e(random, {272, 144, 6, 2}, tokens, tokens % 3 == 0 ? 2 : -1);
    const E4m3Experts weights(random, e, tokens % 2 == 0);
    e.args.programmatic_launch = true;
    e.verify(e.run(e.args), some_tokens(random, tokens, 6),
             (testing::Message() << "e4m3 tokens " << tokens).GetString());
    if (HasFatalFailure()) return;
  }
}

// Tiles of 128 rows multiply by what is rounded to bfloat16: the bits of the same weights stored so.
TEST(ExpertFfn, TilesOfE4m3HaveTheBitsOfBfloat16) {
  Random random(59);
  for (const Layer layer : {Layer{2048, 1408, 12, 6}, Layer{512, 384, 4, 2}, Layer{208, 112, 3, 2}}) {
    for (const int tokens : {120, 333, 1500}) {
      Experts e(random, layer, tokens);
      const ExpertFfn bf16 = e.args;
      const E4m3Experts weights(random, e, tokens == 333);
      e.gate_up_device.upload(e.gate_up);
      e.down_device.upload(e.down);
      EXPECT_EQ(e.run(e.args), e.run(bf16)) << "hidden " << layer.hidden << " tokens " << tokens;
    }
  }
}

TEST(ExpertFfn, BatchInvariantTokensOfE4m3) {
  Random random(61);
  constexpr int kAll = 700;
  Experts e(random, {512, 384, 16, 4}, kAll);
  const E4m3Experts weights(random, e, false);
  e.args.batch_invariant = true;
  const std::vector<std::uint16_t> want = e.run(e.args);
  for (const int tokens : {1, 2, 9, 40, 100, 350}) {
    const int first = random.below(kAll - tokens + 1);
    ExpertFfn part = e.args;
    part.tokens = tokens;
    part.x = e.x_device.get() + std::int64_t(first) * part.x_stride;
    part.inout = e.inout.get() + std::int64_t(first) * part.inout_stride;
    part.ids += std::int64_t(first) * part.experts_per_token;
    part.weights += std::int64_t(first) * part.experts_per_token;
    const std::vector<std::uint16_t> got = e.run(part);
    for (int i = 0; i < tokens * 512; ++i) {
      const std::size_t at = std::size_t(first) * 512 + std::size_t(i);
      ASSERT_EQ(got[at], want[at]) << "tokens " << tokens << " element " << i;
    }
  }
}

TEST(ExpertFfn, ScalesOfOneProductAloneAreRefused) {
  Random random(67);
  Experts e(random, {64, 48, 8, 2}, 3);
  e.args.gate_up_scales = e.weights_device.get();
  EXPECT_EQ(sm90::expert_ffn(e.args, nullptr), cudaErrorInvalidValue);
}

TEST(ExpertFfn, SameBitsEveryTime) {
  Random random(41);
  for (const int tokens : {1, 17, 128, 1500}) {
    Experts e(random, {512, 384, 16, 4}, tokens);
    const std::vector<std::uint16_t> first = e.run(e.args);
    for (int i = 0; i < 5; ++i) EXPECT_EQ(e.run(e.args), first) << "tokens " << tokens;
  }
}

TEST(ExpertFfn, BatchInvariantTokens) {
  Random random(43);
  constexpr int kAll = 700;
  Experts e(random, {512, 384, 16, 4}, kAll);
  e.args.batch_invariant = true;
  const std::vector<std::uint16_t> want = e.run(e.args);
  for (const int tokens : {1, 2, 9, 40, 100, 350}) {
    const int first = random.below(kAll - tokens + 1);
    ExpertFfn part = e.args;
    part.tokens = tokens;
    part.x = e.x_device.get() + std::int64_t(first) * part.x_stride;
    part.inout = e.inout.get() + std::int64_t(first) * part.inout_stride;
    part.ids += std::int64_t(first) * part.experts_per_token;
    part.weights += std::int64_t(first) * part.experts_per_token;
    const std::vector<std::uint16_t> got = e.run(part);
    for (int i = 0; i < tokens * 512; ++i) {
      const std::size_t at = std::size_t(first) * 512 + std::size_t(i);
      ASSERT_EQ(got[at], want[at]) << "tokens " << tokens << " element " << i;
    }
  }
}

}  // namespace
}  // namespace flash_mla::gpu_test
