// Choices of tokens: what stays in the running and how it is distributed, against float64, with fixed seeds.

#include "flash_mla/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "base/philox.h"
#include "flash_mla/error.h"
#include "kernels/sampling/cpu/draw.h"
#include "tensor.h"

namespace flash_mla::conformance {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> random_logits(std::size_t n, unsigned seed, float spread = 2.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

/// Of one row, by the definition: sorted whole, sums in float64.
std::vector<double> distribution(const std::vector<float>& scores, const SamplingOptions& o) {
  const std::size_t n = scores.size();
  std::vector<double> p(n);
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  const double largest = static_cast<double>(scores[order[0]]);
  for (std::size_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(scores[i]);
    p[i] = o.probabilities ? x : std::exp((x - largest) / o.temperature);
  }
  const double best = p[order[0]];
  std::erase_if(order, [&](std::size_t i) { return p[i] < o.min_p * best || p[i] <= 0; });
  const auto sum_of = [&](std::size_t count) {
    double sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum += p[order[i]];
    return sum;
  };
  const std::size_t k =
      o.top_k > 0 ? std::min(order.size(), static_cast<std::size_t>(o.top_k)) : order.size();
  const double whole = sum_of(o.joint ? order.size() : k);
  std::size_t kept = 1;
  while (kept < k && (o.top_p >= 1 || sum_of(kept) < o.top_p * whole)) ++kept;
  order.resize(kept);
  std::vector<double> out(n, 0);
  for (const std::size_t i : order) out[i] = p[i] / sum_of(kept);
  return out;
}

/// `counts` come from `expected`: nothing outside it, and chi-square within five standard deviations of its mean.
void expect_distribution(const std::vector<std::int64_t>& counts, const std::vector<double>& expected) {
  const auto draws = static_cast<double>(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}));
  double chi = 0, rest = 0, rest_expected = 0;
  int cells = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double mean = expected[i] * draws, got = static_cast<double>(counts[i]);
    if (expected[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i;
    }
    if (mean >= 8) {
      chi += (got - mean) * (got - mean) / mean;
      ++cells;
    } else {
      rest += got;
      rest_expected += mean;
    }
  }
  if (rest_expected >= 8) {
    chi += (rest - rest_expected) * (rest - rest_expected) / rest_expected;
    ++cells;
  }
  const double freedom = cells - 1;
  EXPECT_LE(chi, freedom + 5 * std::sqrt(2 * freedom) + 1e-9) << cells << " cells";
}

std::vector<SamplingOptions> grid() {
  std::vector<SamplingOptions> all(9);
  all[1].top_k = 5;
  all[2].top_p = 0.7;
  all[3].min_p = 0.1;
  all[4].temperature = 0.6;
  all[5].top_k = 12, all[5].top_p = 0.8, all[5].temperature = 1.7;
  all[6] = all[5], all[6].joint = true;
  all[7] = all[5], all[7].min_p = 0.05;
  all[8].top_p = 0;
  return all;
}

class Sampling : public testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  template <class T>
  Tensor tensor(DType dtype, const std::vector<std::int64_t>& shape, const std::vector<T>& values) const {
    return {*GetParam(), dtype, shape, values};
  }
  Tensor none(DType dtype, const std::vector<std::int64_t>& shape) const {
    return {*GetParam(), dtype, shape};
  }
  void expect_draws(bool probabilities, DType dtype) const;
};

void Sampling::expect_draws(bool probabilities, DType dtype) const {
  constexpr std::int64_t kVocab = 60, kDraws = 20000;
  std::vector<float> scores = random_logits(kVocab, 3);
  if (probabilities) {
    for (float& x : scores) x = std::exp(x) / 10;
  }
  scores[7] = probabilities ? 0.0f : -kInf;
  scores[20] = scores[30] = scores[40];  // a tie
  const Tensor row = tensor(dtype, {1, kVocab}, scores);
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(row[i]);
  const Tensor rows = tensor(DType::kInt32, {kDraws}, std::vector<int>(kDraws, 0)),
               wide = tensor(DType::kFloat32, {1, kVocab}, scores);
  std::vector<std::int64_t> order(kDraws);
  std::iota(order.begin(), order.end(), 0);
  const Tensor positions = tensor(DType::kInt64, {kDraws}, order);
  Tensor tokens = none(DType::kInt64, {kDraws}), filtered = none(DType::kFloat32, {1, kVocab});
  for (SamplingOptions options : grid()) {
    options.probabilities = probabilities;
    if (probabilities) options.temperature = 1;
    options.seed = 42;
    SampleArgs args;
    args.scores = row.view;
    args.rows = rows.view;
    args.keys.positions = positions.view;
    args.tokens = tokens.view;
    sample_tokens(args, options);
    tokens.download();
    std::vector<std::int64_t> counts(kVocab);
    for (std::size_t i = 0; i < tokens.size(); ++i) ++counts.at(static_cast<std::size_t>(tokens[i]));
    const std::vector<double> expected = distribution(scores, options);
    SCOPED_TRACE(testing::Message() << "top_k " << options.top_k << " top_p " << options.top_p << " min_p "
                                    << options.min_p << " joint " << options.joint);
    expect_distribution(counts, expected);

    // filter_tokens leaves the same tokens.
    filter_tokens(wide.view, {}, filtered.view, options);
    filtered.download();
    for (std::size_t i = 0; i < filtered.size(); ++i) {
      if (probabilities) {
        EXPECT_NEAR(filtered[i], expected[i], 1e-6 * expected[i]);
      } else {
        EXPECT_EQ(filtered[i], static_cast<double>(expected[i] > 0 ? scores[i] : -kInf)) << i;
      }
    }
  }
}

TEST_P(Sampling, DrawsFromLogitsAreDistributedAsTheDefinitionSays) {
  expect_draws(false, DType::kFloat32);
  expect_draws(false, DType::kBFloat16);
}

TEST_P(Sampling, DrawsFromProbabilitiesAreDistributedAsTheDefinitionSays) {
  expect_draws(true, DType::kFloat32);
  expect_draws(true, DType::kBFloat16);
}

TEST_P(Sampling, DrawsAreTheEnginesAndDependOnNothingElse) {
  constexpr std::int64_t kRows = 6, kVocab = 5000;
  const std::vector<float> logits = random_logits(kRows * kVocab, 9);
  const std::vector<std::int64_t> seeds{1, 1, -5, 7, 7, 7}, indices{0, 3, 0, 1, 1, 1},
      positions{0, 0, 9, 9, 10, 11};
  const std::vector<int> top_k{0, 40, 0, 7, 0, 1};
  const std::vector<double> top_p{1, 0.9, 0.95, 1, 0.5, 1}, temperature{1, 0.7, 1.3, 1, 0.9, 1};
  const Tensor t_logits = tensor(DType::kFloat32, {kRows, kVocab}, logits),
               t_seeds = tensor(DType::kInt64, {kRows}, seeds),
               t_indices = tensor(DType::kInt64, {kRows}, indices),
               t_positions = tensor(DType::kInt64, {kRows}, positions),
               t_top_k = tensor(DType::kInt32, {kRows}, top_k),
               t_top_p = tensor(DType::kFloat64, {kRows}, top_p),
               t_temperature = tensor(DType::kFloat64, {kRows}, temperature);
  Tensor tokens = none(DType::kInt32, {kRows});
  SampleArgs args;
  args.scores = t_logits.view;
  args.options = {t_temperature.view, t_top_k.view, t_top_p.view, {}};
  args.keys = {t_seeds.view, t_indices.view, t_positions.view};
  args.tokens = tokens.view;
  sample_tokens(args);
  tokens.download();
  cpu::DrawScratch scratch;
  for (std::size_t i = 0; i < kRows; ++i) {
    const std::span<const float> row(logits.data() + i * kVocab, kVocab);
    const Draw draw =
        cpu::make_draw(uniform(static_cast<std::uint64_t>(seeds[i]), static_cast<std::uint32_t>(indices[i]),
                               static_cast<std::uint64_t>(positions[i])),
                       temperature[i], top_k[i], top_p[i], 0);
    EXPECT_EQ(tokens[i], cpu::draw_token(row, *std::ranges::max_element(row), draw, scratch)) << i;
  }
  EXPECT_EQ(tokens[5], std::ranges::max_element(logits.begin() + 5 * kVocab, logits.end()) -
                           (logits.begin() + 5 * kVocab));  // top_k 1
}

// Whatever a backend does, its tokens and what it leaves are the CPU's: vocabularies of one block and of many, cuts that keep
// few tokens and thousands, flat rows and peaked ones, ties.
TEST_P(Sampling, EveryBackendHasTheCpusTokens) {
  unsigned seed = 100;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t vocab : {1, 37, 3000, 32000, 129280}) {
      for (const float spread : {0.3f, 3.0f}) {
        for (const bool probabilities : {false, true}) {
          constexpr std::int64_t kRows = 9;
          std::vector<float> values = random_logits(static_cast<std::size_t>(kRows * vocab), seed++, spread);
          if (probabilities) {
            for (float& x : values) x = std::exp(x - 3);
          }
          Tensor scores = tensor(dtype, {kRows, vocab}, values);
          Tensor top_k = tensor(DType::kInt64, {kRows}, std::vector{0, 50, 0, 2500, 1, 5, 20000, 0, 400}),
                 top_p = tensor(DType::kFloat32, {kRows},
                                std::vector{1.0, 1.0, 0.9, 0.97, 0.5, 0.3, 0.99, 0.0, 1.0}),
                 min_p = tensor(DType::kFloat64, {kRows},
                                std::vector{0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.02}),
                 temperature = tensor(DType::kFloat32, {kRows},
                                      std::vector{1.0, 0.7, 1.0, 1.3, 1.0, 2.0, 1.0, 1.0, 0.0});
          for (const bool joint : {false, true}) {
            SamplingOptions options;
            options.probabilities = probabilities;
            options.joint = joint;
            options.seed = seed;
            SamplingRows rows{{}, top_k.view, top_p.view, min_p.view},
                host{{}, top_k.host(), top_p.host(), min_p.host()};
            if (!probabilities) rows.temperature = temperature.view, host.temperature = temperature.host();
            SampleArgs args;
            args.scores = scores.view;
            args.options = rows;
            Tensor tokens = none(DType::kInt32, {kRows}), expected = none(DType::kInt32, {kRows});
            args.tokens = tokens.view;
            sample_tokens(args, options);
            tokens.download();
            SampleArgs on_host = args;
            on_host.scores = scores.host();
            on_host.options = host;
            on_host.tokens = expected.host();
            sample_tokens(on_host, options);
            EXPECT_EQ(tokens.values(), expected.values())
                << dtype_name(dtype) << " vocab " << vocab << " spread " << spread << " probabilities "
                << probabilities << " joint " << joint;
            Tensor left = none(dtype, {kRows, vocab}), expected_left = none(dtype, {kRows, vocab});
            filter_tokens(scores.view, rows, left.view, options);
            left.download();
            filter_tokens(scores.host(), host, expected_left.host(), options);
            std::size_t wrong = 0;
            for (std::size_t i = 0; i < left.size(); ++i) {
              const double a = left[i], b = expected_left[i];
              wrong += a == b || std::abs(a - b) <= 1e-6 * std::abs(b) ? 0 : 1;
            }
            EXPECT_EQ(wrong, 0U) << dtype_name(dtype) << " vocab " << vocab << " spread " << spread
                                 << " probabilities " << probabilities << " joint " << joint;
          }
        }
      }
    }
  }
}

TEST_P(Sampling, GreedyTiesAndRowsWithoutAToken) {
  const Tensor logits =
      tensor(DType::kFloat32, {2, 4}, std::vector<float>{1, 3, 3, 2, -kInf, -kInf, -kInf, -kInf});
  Tensor tokens = none(DType::kInt32, {2}), valid = none(DType::kUInt8, {2});
  SampleArgs args;
  args.scores = logits.view;
  args.tokens = tokens.view;
  args.valid = valid.view;
  SamplingOptions options;
  options.temperature = 0;
  sample_tokens(args, options);
  tokens.download();
  valid.download();
  EXPECT_EQ(tokens.values(), (std::vector<double>{1, -1}));
  EXPECT_EQ(valid.values(), (std::vector<double>{1, 0}));
  // The second of two equals goes first.
  options.temperature = 1;
  options.top_k = 1;
  sample_tokens(args, options);
  tokens.download();
  EXPECT_EQ(tokens.values(), (std::vector<double>{1, -1}));
}

TEST_P(Sampling, LogitsThatNoDrawReachesStayWhereOnlyTopKCuts) {
  Tensor logits = tensor(DType::kFloat32, {1, 5}, std::vector<float>{0, -100, -200, 5, -300}),
         out = none(DType::kFloat32, {1, 5});
  const std::vector<double> expected{0, -100, -200, 5, -INFINITY};
  SamplingOptions options;
  options.top_k = 4;
  filter_tokens(logits.view, {}, out.view, options);
  out.download();
  EXPECT_EQ(out.values(), expected);
  // In place.
  filter_tokens(logits.view, {}, logits.view, options);
  logits.download();
  EXPECT_EQ(logits.values(), expected);
}

TEST_P(Sampling, ProbabilitiesOfLogits) {
  constexpr std::int64_t kVocab = 1000;
  const std::vector<float> logits = random_logits(2 * kVocab, 11, 5);
  const Tensor t_logits = tensor(DType::kFloat32, {2, kVocab}, logits),
               temperature = tensor(DType::kFloat32, {2}, std::vector{0.5, 0.0});
  Tensor out = none(DType::kFloat32, {2, kVocab});
  SamplingRows rows;
  rows.temperature = temperature.view;
  token_probabilities(t_logits.view, rows, out.view);
  out.download();
  SamplingOptions half;
  half.temperature = 0.5;
  const std::vector<double> expected = distribution({logits.begin(), logits.begin() + kVocab}, half);
  double of_greedy = 0;
  for (std::size_t i = 0; i < kVocab; ++i) {
    EXPECT_NEAR(out[i], expected[i], 2e-7 * expected[i] + 1e-30);
    of_greedy += out[kVocab + i];
  }
  EXPECT_EQ(of_greedy, 1.0);
  EXPECT_EQ(out[static_cast<std::size_t>(kVocab + (std::max_element(logits.begin() + kVocab, logits.end()) -
                                                   (logits.begin() + kVocab)))],
            1.0);
}

TEST_P(Sampling, SpeculativeTokensAreTheTargets) {
  // One chain of two drafts, many times: the first token is q0's and, of those with q0's token t, the second q1's.
  constexpr std::int64_t kVocab = 12, kChains = 40000, kDrafts = 2;
  std::vector<std::vector<float>> p(kDrafts), q(kDrafts + 1);
  std::vector<float> draft_probs, target_probs;
  const auto normalised = [](std::vector<float> x, std::size_t never) {
    x[never] = -kInf;
    float sum = 0;
    for (float& v : x) sum += v = std::exp(v);
    for (float& v : x) v /= sum;
    return x;
  };
  for (unsigned i = 0; i < kDrafts; ++i) p[i] = normalised(random_logits(kVocab, i + 1, 1), i + 4);
  for (unsigned i = 0; i <= kDrafts; ++i) q[i] = normalised(random_logits(kVocab, i + 11, 1), i);
  std::mt19937_64 rng(5);
  std::vector<std::int32_t> drafts;
  for (std::int64_t c = 0; c < kChains; ++c) {
    for (const auto& x : p) {
      draft_probs.insert(draft_probs.end(), x.begin(), x.end());
      drafts.push_back(std::discrete_distribution<std::int32_t>(x.begin(), x.end())(rng));
    }
    for (const auto& x : q) target_probs.insert(target_probs.end(), x.begin(), x.end());
  }
  Tensor t_draft = tensor(DType::kFloat32, {kChains, kDrafts, kVocab}, draft_probs),
         t_target = tensor(DType::kFloat32, {kChains, kDrafts + 1, kVocab}, target_probs),
         t_drafts = tensor(DType::kInt32, {kChains, kDrafts}, drafts),
         tokens = none(DType::kInt32, {kChains, kDrafts + 1}), accepted = none(DType::kInt32, {kChains}),
         emitted = none(DType::kInt32, {kChains});
  const SpeculativeArgs args{t_draft.view, t_drafts.view, t_target.view, {},
                             tokens.view,  accepted.view, emitted.view};
  SamplingOptions options;
  options.seed = 77;
  speculative_sampling(args, options);
  for (Tensor* t : {&tokens, &accepted, &emitted}) t->download();
  {
    Tensor same = none(DType::kInt32, {kChains, kDrafts + 1});
    speculative_sampling({t_draft.host(), t_drafts.host(), t_target.host(), {}, same.host(), {}, {}},
                         options);
    EXPECT_TRUE(same.bytes == tokens.bytes);  // the CPU's
  }
  std::vector<std::vector<std::int64_t>> counts(kDrafts + 1, std::vector<std::int64_t>(kVocab));
  double acceptable = 0;
  for (std::size_t c = 0; c < kChains; ++c) {
    const auto row = [&](std::size_t i) { return static_cast<std::int32_t>(tokens[c * (kDrafts + 1) + i]); };
    const auto n = static_cast<std::size_t>(emitted[c]);
    for (std::size_t i = 0; i <= kDrafts; ++i) {
      if (i <= n) ++counts[i][static_cast<std::size_t>(row(i))];
      if (i != n) {
        ASSERT_EQ(row(i), i < n ? drafts[c * kDrafts + i] : -1);
      }
    }
    ASSERT_GE(accepted[c], emitted[c]);
    acceptable += accepted[c];
  }
  // Whether token i is reached does not depend on what it then is.
  for (std::size_t i = 0; i <= kDrafts; ++i) {
    SCOPED_TRACE(testing::Message() << "token " << i);
    expect_distribution(counts[i], {q[i].begin(), q[i].end()});
  }
  double overlap = 0;
  for (std::size_t i = 0; i < kDrafts; ++i) {
    for (std::size_t t = 0; t < kVocab; ++t) overlap += static_cast<double>(std::min(p[i][t], q[i][t]));
  }
  EXPECT_NEAR(acceptable / kChains, overlap, 0.02);
}

TEST_P(Sampling, BadInputIsNamed) {
  const Tensor tokens = none(DType::kInt32, {2}), one = none(DType::kInt32, {1}),
               rows = tensor(DType::kInt32, {2}, std::vector{0, 2}),
               top_p = tensor(DType::kFloat32, {2}, std::vector{0.5, 1.5});
  std::vector<float> scores;
  const auto message = [&](const auto& change) -> std::string {
    scores = {1, 2, 3, 4};
    SampleArgs args;
    args.tokens = tokens.view;
    SamplingOptions options;
    change(args, options);
    const Tensor t_scores = tensor(DType::kFloat32, {2, 2}, scores);
    args.scores = t_scores.view;
    try {
      sample_tokens(args, options);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  };
  const auto of = [&](const auto& change) {
    return message([&](SampleArgs&, SamplingOptions& o) { change(o); });
  };
  EXPECT_EQ(of([](SamplingOptions&) {}), "accepted");
  EXPECT_EQ(of([](SamplingOptions& o) { o.temperature = -1; }),
            "temperature is -1, expected a finite number >= 0");
  EXPECT_EQ(of([](SamplingOptions& o) { o.top_k = -3; }), "top_k is -3, expected >= 0 (0: all)");
  EXPECT_EQ(of([](SamplingOptions& o) { o.min_p = std::nan(""); }), "min_p is nan, expected 0 to 1");
  EXPECT_EQ(of([](SamplingOptions& o) { o.probabilities = true, o.temperature = 2; }),
            "temperature is 2, expected 1 with probabilities, which a temperature has made");
  EXPECT_EQ(message([&](SampleArgs& a, SamplingOptions&) { a.tokens = one.view; }),
            "tokens.shape[0] is 1, expected scores.shape[0] (n) = 2");
  const auto changed = [&](const auto& change) {
    return message([&](SampleArgs& a, SamplingOptions& o) { change(a, o); });
  };
  if (!GetParam()->checks_values()) {
    // A row that is none, and a row of NaN, have no token.
    Tensor got = none(DType::kInt32, {2});
    EXPECT_EQ(changed([&](SampleArgs& a, SamplingOptions&) { a.rows = rows.view, a.tokens = got.view; }),
              "accepted");
    got.download();
    EXPECT_EQ(got[1], -1);
    EXPECT_EQ(changed([&](SampleArgs& a, SamplingOptions&) {
                scores[0] = scores[1] = std::nanf(""), a.tokens = got.view;
              }),
              "accepted");
    got.download();
    EXPECT_EQ(got[0], -1);
    EXPECT_GE(got[1], 0);
    return;
  }
  EXPECT_EQ(changed([&](SampleArgs& a, SamplingOptions&) { a.options.top_p = top_p.view; }),
            "top_p[1] is 1.5, expected 0 to 1");
  EXPECT_EQ(changed([&](SampleArgs& a, SamplingOptions&) { a.rows = rows.view; }),
            "rows[1] is 2, expected 0 to scores.shape[0] - 1 = 1");
  EXPECT_EQ(changed([&](SampleArgs&, SamplingOptions&) { scores[2] = std::nanf(""); }),
            "scores[1][0] is nan, expected a logit: a number below infinity");
  EXPECT_EQ(changed([&](SampleArgs&, SamplingOptions& o) { scores[1] = -0.5f, o.probabilities = true; }),
            "scores[0][1] is -0.5, expected a probability: finite and >= 0");
  EXPECT_EQ(changed([&](SampleArgs&, SamplingOptions&) { scores[2] = scores[3] = -kInf; }),
            "scores[1] has no token that is possible, expected one at least");
}

INSTANTIATE_TEST_SUITE_P(Backends, Sampling, testing::ValuesIn(backends_under_test()),
                         [](const auto& backend) { return backend.param->name(); });

}  // namespace
}  // namespace flash_mla::conformance
