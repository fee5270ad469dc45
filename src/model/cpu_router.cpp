#include "model/cpu_router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace flash_mla::model {
namespace {

void score(ScoringFunc function, const float* logits, std::vector<float>& scores) {
  if (function == ScoringFunc::kSigmoid) {
    std::transform(logits, logits + scores.size(), scores.begin(),
                   [](float x) { return 1.0f / (1.0f + std::exp(-x)); });
    return;
  }
  const float highest = *std::max_element(logits, logits + scores.size());
  float sum = 0;
  for (std::size_t e = 0; e < scores.size(); ++e) sum += scores[e] = std::exp(logits[e] - highest);
  for (float& s : scores) s /= sum;
}

/// Indices of the `count` largest values, largest first.
std::vector<std::int32_t> top(const std::vector<float>& values, int count) {
  std::vector<std::int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](std::int32_t a, std::int32_t b) {
    const float x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  order.resize(static_cast<std::size_t>(count));
  return order;
}

/// What a group of experts is worth: its best score, or with `best_two` the sum of its two best.
float group_score(const float* scores, std::size_t size, bool best_two) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (std::size_t e = 0; e < size; ++e) {
    if (scores[e] > first) {
      second = std::exchange(first, scores[e]);
    } else {
      second = std::max(second, scores[e]);
    }
  }
  return best_two ? first + second : first;
}

/// Leaves only the experts of the topk_group best groups in the running.
void limit_to_groups(const ModelConfig& config, std::vector<float>& choice) {
  const std::size_t size = choice.size() / static_cast<std::size_t>(config.n_group);
  std::vector<float> groups;
  for (int g = 0; g < config.n_group; ++g) {
    groups.push_back(group_score(choice.data() + static_cast<std::size_t>(g) * size, size,
                                 config.topk_method == TopkMethod::kNoAuxTc));
  }
  std::vector<float> kept(choice.size(), -std::numeric_limits<float>::infinity());
  for (const std::int32_t g : top(groups, config.topk_group)) {
    const std::size_t first = static_cast<std::size_t>(g) * size;
    std::copy_n(choice.begin() + static_cast<std::ptrdiff_t>(first), size,
                kept.begin() + static_cast<std::ptrdiff_t>(first));
  }
  choice = std::move(kept);
}

}  // namespace

void choose_experts(const ModelConfig& config, const float* logits, const float* bias, std::int32_t* ids,
                    float* weights) {
  std::vector<float> scores(static_cast<std::size_t>(config.n_routed_experts));
  score(config.scoring_func, logits, scores);
  std::vector<float> choice = scores;
  if (bias != nullptr) {
    for (std::size_t e = 0; e < choice.size(); ++e) choice[e] += bias[e];
  }
  if (config.topk_method != TopkMethod::kGreedy) limit_to_groups(config, choice);

  const std::vector<std::int32_t> chosen = top(choice, config.num_experts_per_tok);
  float sum = 0;
  for (const std::int32_t e : chosen) sum += scores[static_cast<std::size_t>(e)];
  const auto factor = static_cast<float>(config.routed_scaling_factor);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const float weight = scores[static_cast<std::size_t>(chosen[i])];
    ids[i] = chosen[i];
    weights[i] = (config.norm_topk_prob ? weight / (sum + 1e-20f) : weight) * factor;
  }
}

}  // namespace flash_mla::model
