// Choices of experts against the definition in float64.

#include "flash_mla/routing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

template <class T>
TensorView view(std::vector<T>& v, DType dtype, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(v.data(), dtype, shape);
}

struct Choice {
  std::vector<std::int32_t> ids;
  std::vector<double> weights;
  double margin = 1;  ///< by how much what was chosen is better than what was not, in groups and in experts
};

std::vector<std::size_t> best_first(const std::vector<double>& x) {
  std::vector<std::size_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return x[a] > x[b]; });
  return order;
}

Choice choose(const std::vector<double>& logits, const std::vector<double>& bias, std::size_t k,
              const RoutingOptions& o) {
  std::vector<double> scores;
  double sum = 0;
  const double largest = *std::ranges::max_element(logits);
  for (const double x : logits) {
    scores.push_back(o.scores == ExpertScores::kSigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x - largest));
    sum += scores.back();
  }
  if (o.scores == ExpertScores::kSoftmax) {
    for (double& s : scores) s /= sum;
  }
  std::vector<double> choice = scores;
  for (std::size_t e = 0; e < bias.size(); ++e) choice[e] += bias[e];
  Choice out;
  const auto groups = static_cast<std::size_t>(o.num_groups), kept = static_cast<std::size_t>(o.groups_kept);
  const std::size_t size = choice.size() / groups;
  std::vector<double> worth;
  for (std::size_t g = 0; g < groups; ++g) {
    std::vector<double> of(choice.begin() + static_cast<std::ptrdiff_t>(g * size),
                           choice.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
    std::ranges::sort(of, std::greater<>());
    worth.push_back(o.groups_by_best_two && groups > 1 ? of[0] + of[1] : of[0]);
  }
  const std::vector<std::size_t> order = best_first(worth);
  if (kept < groups) out.margin = worth[order[kept - 1]] - worth[order[kept]];
  for (std::size_t i = kept; i < groups; ++i) {
    for (std::size_t e = 0; e < size; ++e)
      choice[order[i] * size + e] = -std::numeric_limits<double>::infinity();
  }
  const std::vector<std::size_t> experts = best_first(choice);
  for (std::size_t i = 0; i < k; ++i) {
    if (i + 1 < experts.size())
      out.margin = std::min(out.margin, choice[experts[i]] - choice[experts[i + 1]]);
    out.ids.push_back(static_cast<std::int32_t>(experts[i]));
    out.weights.push_back(scores[experts[i]]);
  }
  const double total = std::accumulate(out.weights.begin(), out.weights.end(), 0.0);
  for (double& w : out.weights) w = (o.normalise ? w / total : w) * static_cast<double>(o.scale);
  return out;
}

/// DeepSeek-V2-Lite's, V2's, V3's and some of nobody's.
struct Model {
  const char* name;
  std::int64_t experts, k;
  bool biased;
  RoutingOptions options;
};
const Model kModels[] = {
    {"v2_lite", 64, 6, false, {}},
    {"v2", 160, 6, false, {.num_groups = 8, .groups_kept = 3, .scale = 16}},
    {"v3",
     256,
     8,
     true,
     {.scores = ExpertScores::kSigmoid,
      .num_groups = 8,
      .groups_kept = 4,
      .groups_by_best_two = true,
      .normalise = true,
      .scale = 2.5f}},
    {"kimi", 384, 8, true, {.scores = ExpertScores::kSigmoid, .normalise = true, .scale = 2.827f}},
    {"odd", 7, 7, false, {.normalise = true}},
    {"one", 1, 1, true, {}},
};

TEST(Routing, EveryModelIsTheDefinition) {
  for (const Model& m : kModels) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      constexpr std::int64_t kTokens = 37;
      std::mt19937 rng(static_cast<unsigned>(m.experts));
      std::normal_distribution<float> normal;
      std::vector<double> logits;
      std::vector<float> wide;
      std::vector<std::uint16_t> narrow;
      std::vector<float> bias;
      for (std::int64_t i = 0; i < kTokens * m.experts; ++i) {
        const float x = 2 * normal(rng);
        narrow.push_back(dtype == DType::kFloat16 ? to_fp16(x).bits : to_bf16(x).bits);
        wide.push_back(x);
        logits.push_back(static_cast<double>(dtype == DType::kFloat32   ? x
                                             : dtype == DType::kFloat16 ? to_float(Fp16{narrow.back()})
                                                                        : to_float(Bf16{narrow.back()})));
      }
      for (std::int64_t e = 0; e < m.experts && m.biased; ++e) bias.push_back(0.1f * normal(rng));
      std::vector<std::int32_t> ids(static_cast<std::size_t>(kTokens * m.k));
      std::vector<float> weights(ids.size());
      RoutingArgs args;
      args.logits = dtype == DType::kFloat32 ? view(wide, dtype, {kTokens, m.experts})
                                             : view(narrow, dtype, {kTokens, m.experts});
      if (m.biased) args.bias = view(bias, DType::kFloat32, {m.experts});
      args.ids = view(ids, DType::kInt32, {kTokens, m.k});
      args.weights = view(weights, DType::kFloat32, {kTokens, m.k});
      choose_experts(args, m.options);
      int compared = 0;
      for (std::size_t t = 0; t < kTokens; ++t) {
        const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(t) * m.experts;
        const Choice expected = choose({begin, begin + m.experts}, {bias.begin(), bias.end()},
                                       static_cast<std::size_t>(m.k), m.options);
        if (expected.margin < 1e-6) continue;  // float32 may see it otherwise, and equals go by id
        ++compared;
        for (std::size_t i = 0; i < expected.ids.size(); ++i) {
          const std::size_t at = t * expected.ids.size() + i;
          ASSERT_EQ(ids[at], expected.ids[i]) << m.name << " token " << t << " choice " << i;
          EXPECT_NEAR(static_cast<double>(weights[at]), expected.weights[i], 2e-6 * expected.weights[i])
              << m.name;
        }
      }
      EXPECT_GT(compared, kTokens / 3) << m.name << " " << dtype_name(dtype);
    }
  }
}

TEST(Routing, EqualsGoByIdAndWeightsMayBeNarrow) {
  std::vector<std::uint16_t> logits, weights(6);
  for (const float x : {1.f, 1.f, 1.f, 1.f, 0.f, 2.f, 1.f, 2.f}) logits.push_back(to_bf16(x).bits);
  std::vector<std::int32_t> ids(6);
  RoutingArgs args;
  args.logits = view(logits, DType::kBFloat16, {2, 4});
  args.ids = view(ids, DType::kInt32, {2, 3});
  args.weights = view(weights, DType::kBFloat16, {2, 3});
  choose_experts(args);
  EXPECT_EQ(ids, (std::vector<std::int32_t>{0, 1, 2, 1, 3, 2}));
  EXPECT_EQ(to_float(Bf16{weights[0]}), 0.25f);
}

TEST(Routing, BadInputIsNamed) {
  std::vector<float> logits(8, 1.0f), weights(4), bias(4);
  std::vector<std::int32_t> ids(4);
  const auto message = [&](const auto& change) -> std::string {
    RoutingArgs args;
    args.logits = view(logits, DType::kFloat32, {2, 4});
    args.ids = view(ids, DType::kInt32, {2, 2});
    args.weights = view(weights, DType::kFloat32, {2, 2});
    RoutingOptions options;
    change(args, options);
    try {
      choose_experts(args, options);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "accepted";
  };
  const auto of = [&](const auto& change) {
    return message([&](RoutingArgs&, RoutingOptions& o) { change(o); });
  };
  EXPECT_EQ(of([](RoutingOptions&) {}), "accepted");
  EXPECT_EQ(of([](RoutingOptions& o) { o.num_groups = 3; }),
            "num_groups is 3, expected a divisor of logits.shape[1] (num_experts) = 4");
  EXPECT_EQ(of([](RoutingOptions& o) { o.groups_kept = 2; }),
            "groups_kept is 2, expected 1 to num_groups = 1");
  EXPECT_EQ(of([](RoutingOptions& o) { o.num_groups = 4; }),
            "ids.shape[1] (k) is 2, expected 1 to 1 (experts of the groups that are kept)");
  EXPECT_EQ(message([&](RoutingArgs& a, RoutingOptions&) { a.bias = view(bias, DType::kFloat32, {3}); }),
            "bias.shape[0] is 3, expected logits.shape[1] (num_experts) = 4");
  logits[5] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(of([](RoutingOptions&) {}), "logits[1][1] is inf, expected a finite number");
}

}  // namespace
}  // namespace flash_mla
