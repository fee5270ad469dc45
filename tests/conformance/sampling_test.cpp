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

namespace flash_mla {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
TensorView view(std::vector<T>& v, DType dtype, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(v.data(), dtype, shape);
}

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

class Draws : public testing::TestWithParam<std::tuple<bool, DType>> {};

TEST_P(Draws, AreDistributedAsTheDefinitionSays) {
  const auto [probabilities, dtype] = GetParam();
  constexpr std::int64_t kVocab = 60, kDraws = 20000;
  std::vector<float> scores = random_logits(kVocab, 3);
  if (probabilities) {
    for (float& x : scores) x = std::exp(x) / 10;
  }
  scores[7] = probabilities ? 0.0f : -kInf;
  scores[20] = scores[30] = scores[40];  // a tie
  std::vector<std::uint16_t> narrow(kVocab);
  TensorView row = view(scores, DType::kFloat32, {1, kVocab});
  if (dtype == DType::kBFloat16) {
    for (std::size_t i = 0; i < narrow.size(); ++i) {
      narrow[i] = to_bf16(scores[i]).bits;
      scores[i] = to_float(Bf16{narrow[i]});
    }
    row = view(narrow, dtype, {1, kVocab});
  }
  std::vector<std::int32_t> rows(kDraws, 0);
  std::vector<std::int64_t> tokens(kDraws), positions(kDraws);
  std::iota(positions.begin(), positions.end(), 0);
  for (SamplingOptions options : grid()) {
    options.probabilities = probabilities;
    if (probabilities) options.temperature = 1;
    options.seed = 42;
    SampleArgs args;
    args.scores = row;
    args.rows = view(rows, DType::kInt32, {kDraws});
    args.keys.positions = view(positions, DType::kInt64, {kDraws});
    args.tokens = view(tokens, DType::kInt64, {kDraws});
    sample_tokens(args, options);
    std::vector<std::int64_t> counts(kVocab);
    for (const std::int64_t token : tokens) ++counts[static_cast<std::size_t>(token)];
    const std::vector<double> expected = distribution(scores, options);
    SCOPED_TRACE(testing::Message() << "top_k " << options.top_k << " top_p " << options.top_p << " min_p "
                                    << options.min_p << " joint " << options.joint);
    expect_distribution(counts, expected);

    // filter_tokens leaves the same tokens.
    std::vector<float> filtered(kVocab);
    TensorView out = view(filtered, DType::kFloat32, {1, kVocab}),
               in = view(scores, DType::kFloat32, {1, kVocab});
    filter_tokens(in, {}, out, options);
    for (std::size_t i = 0; i < filtered.size(); ++i) {
      if (probabilities) {
        EXPECT_NEAR(static_cast<double>(filtered[i]), expected[i], 1e-6 * expected[i]);
      } else {
        EXPECT_EQ(filtered[i], expected[i] > 0 ? scores[i] : -kInf) << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sampling, Draws,
                         testing::Combine(testing::Bool(),
                                          testing::Values(DType::kFloat32, DType::kBFloat16)),
                         [](const auto& p) {
                           return std::string(std::get<0>(p.param) ? "probabilities_" : "logits_") +
                                  dtype_name(std::get<1>(p.param));
                         });

TEST(Sampling, DrawsAreTheEnginesAndDependOnNothingElse) {
  constexpr std::int64_t kRows = 6, kVocab = 5000;
  std::vector<float> logits = random_logits(kRows * kVocab, 9);
  std::vector<std::int64_t> seeds{1, 1, -5, 7, 7, 7}, indices{0, 3, 0, 1, 1, 1},
      positions{0, 0, 9, 9, 10, 11};
  std::vector<std::int32_t> tokens(kRows), top_k{0, 40, 0, 7, 0, 1};
  std::vector<double> top_p{1, 0.9, 0.95, 1, 0.5, 1}, temperature{1, 0.7, 1.3, 1, 0.9, 1};
  SampleArgs args;
  args.scores = view(logits, DType::kFloat32, {kRows, kVocab});
  args.options = {view(temperature, DType::kFloat64, {kRows}),
                  view(top_k, DType::kInt32, {kRows}),
                  view(top_p, DType::kFloat64, {kRows}),
                  {}};
  args.keys = {view(seeds, DType::kInt64, {kRows}), view(indices, DType::kInt64, {kRows}),
               view(positions, DType::kInt64, {kRows})};
  args.tokens = view(tokens, DType::kInt32, {kRows});
  sample_tokens(args);
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

TEST(Sampling, GreedyTiesAndRowsWithoutAToken) {
  std::vector<float> logits{1, 3, 3, 2, -kInf, -kInf, -kInf, -kInf};
  std::vector<std::int32_t> tokens(2);
  std::vector<std::uint8_t> valid(2);
  SampleArgs args;
  args.scores = view(logits, DType::kFloat32, {2, 4});
  args.tokens = view(tokens, DType::kInt32, {2});
  args.valid = view(valid, DType::kUInt8, {2});
  SamplingOptions options;
  options.temperature = 0;
  sample_tokens(args, options);
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{1, -1}));
  EXPECT_EQ(valid, (std::vector<std::uint8_t>{1, 0}));
  // The second of two equals goes first.
  options.temperature = 1;
  options.top_k = 1;
  sample_tokens(args, options);
  EXPECT_EQ(tokens[0], 1);
}

TEST(Sampling, LogitsThatNoDrawReachesStayWhereOnlyTopKCuts) {
  std::vector<float> logits{0, -100, -200, 5, -300};
  std::vector<float> out(5);
  SamplingOptions options;
  options.top_k = 4;
  filter_tokens(view(logits, DType::kFloat32, {1, 5}), {}, view(out, DType::kFloat32, {1, 5}), options);
  EXPECT_EQ(out, (std::vector<float>{0, -100, -200, 5, -kInf}));
  // In place.
  filter_tokens(view(logits, DType::kFloat32, {1, 5}), {}, view(logits, DType::kFloat32, {1, 5}), options);
  EXPECT_EQ(out, logits);
}

TEST(Sampling, ProbabilitiesOfLogits) {
  constexpr std::int64_t kVocab = 1000;
  std::vector<float> logits = random_logits(2 * kVocab, 11, 5), out(2 * kVocab);
  std::vector<float> temperature{0.5f, 0};
  SamplingRows rows;
  rows.temperature = view(temperature, DType::kFloat32, {2});
  token_probabilities(view(logits, DType::kFloat32, {2, kVocab}), rows,
                      view(out, DType::kFloat32, {2, kVocab}));
  SamplingOptions half;
  half.temperature = 0.5;
  const std::vector<double> expected = distribution({logits.begin(), logits.begin() + kVocab}, half);
  for (std::size_t i = 0; i < kVocab; ++i) {
    EXPECT_NEAR(static_cast<double>(out[i]), expected[i], 2e-7 * expected[i] + 1e-30);
  }
  EXPECT_EQ(std::accumulate(out.begin() + kVocab, out.end(), 0.0f), 1.0f);
  EXPECT_EQ(out[static_cast<std::size_t>(kVocab + (std::max_element(logits.begin() + kVocab, logits.end()) -
                                                   (logits.begin() + kVocab)))],
            1.0f);
}

TEST(SpeculativeSampling, TokensAreTheTargets) {
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
  std::vector<std::int32_t> drafts, tokens(kChains * (kDrafts + 1)), accepted(kChains), emitted(kChains);
  for (std::int64_t c = 0; c < kChains; ++c) {
    for (const auto& x : p) {
      draft_probs.insert(draft_probs.end(), x.begin(), x.end());
      drafts.push_back(std::discrete_distribution<std::int32_t>(x.begin(), x.end())(rng));
    }
    for (const auto& x : q) target_probs.insert(target_probs.end(), x.begin(), x.end());
  }
  SpeculativeArgs args;
  args.draft_probs = view(draft_probs, DType::kFloat32, {kChains, kDrafts, kVocab});
  args.draft_tokens = view(drafts, DType::kInt32, {kChains, kDrafts});
  args.target_probs = view(target_probs, DType::kFloat32, {kChains, kDrafts + 1, kVocab});
  args.tokens = view(tokens, DType::kInt32, {kChains, kDrafts + 1});
  args.accepted = view(accepted, DType::kInt32, {kChains});
  args.emitted = view(emitted, DType::kInt32, {kChains});
  SamplingOptions options;
  options.seed = 77;
  speculative_sampling(args, options);
  std::vector<std::vector<std::int64_t>> counts(kDrafts + 1, std::vector<std::int64_t>(kVocab));
  double acceptable = 0;
  for (std::size_t c = 0; c < kChains; ++c) {
    const std::int32_t* row = &tokens[c * (kDrafts + 1)];
    const auto n = static_cast<std::size_t>(emitted[c]);
    for (std::size_t i = 0; i <= kDrafts; ++i) {
      if (i <= n) ++counts[i][static_cast<std::size_t>(row[i])];
      if (i != n) {
        ASSERT_EQ(row[i], i < n ? drafts[c * kDrafts + i] : -1);
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

TEST(Sampling, BadInputIsNamed) {
  std::vector<float> scores{1, 2, 3, 4};
  std::vector<std::int32_t> tokens(2), rows{0, 2};
  std::vector<float> top_p{0.5f, 1.5f};
  const auto message = [&](const auto& change) -> std::string {
    scores = {1, 2, 3, 4};
    SampleArgs args;
    args.scores = view(scores, DType::kFloat32, {2, 2});
    args.tokens = view(tokens, DType::kInt32, {2});
    SamplingOptions options;
    change(args, options);
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
  EXPECT_EQ(
      message([&](SampleArgs& a, SamplingOptions&) { a.options.top_p = view(top_p, DType::kFloat32, {2}); }),
      "top_p[1] is 1.5, expected 0 to 1");
  EXPECT_EQ(message([&](SampleArgs& a, SamplingOptions&) { a.rows = view(rows, DType::kInt32, {2}); }),
            "rows[1] is 2, expected 0 to scores.shape[0] - 1 = 1");
  EXPECT_EQ(message([&](SampleArgs&, SamplingOptions&) { scores[2] = std::nanf(""); }),
            "scores[1][0] is nan, expected a logit: a number below infinity");
  EXPECT_EQ(message([&](SampleArgs&, SamplingOptions& o) { scores[1] = -0.5f, o.probabilities = true; }),
            "scores[0][1] is -0.5, expected a probability: finite and >= 0");
  EXPECT_EQ(message([&](SampleArgs&, SamplingOptions&) { scores[2] = scores[3] = -kInf; }),
            "scores[1] has no token that is possible, expected one at least");
  EXPECT_EQ(message([&](SampleArgs& a, SamplingOptions&) { a.tokens = view(tokens, DType::kInt32, {1}); }),
            "tokens.shape[0] is 1, expected scores.shape[0] (n) = 2");
}

}  // namespace
}  // namespace flash_mla
