#include "kernels/moe/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace flash_mla::cpu {
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

/// What a thread works in; a model routes every token in every layer.
struct Workspace {
  std::vector<float> scores, choice, groups, kept;
  std::vector<std::int32_t> order;
};

/// Indices of the `count` largest values, largest first, in `order`.
void top(const std::vector<float>& values, int count, std::vector<std::int32_t>& order) {
  order.resize(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](std::int32_t a, std::int32_t b) {
    const float x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  order.resize(static_cast<std::size_t>(count));
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

/// Leaves only the experts of the groups_kept best groups in the running.
void limit_to_groups(const Routing& routing, Workspace& w) {
  const std::size_t size = w.choice.size() / static_cast<std::size_t>(routing.num_groups);
  w.groups.clear();
  for (int g = 0; g < routing.num_groups; ++g) {
    w.groups.push_back(group_score(w.choice.data() + static_cast<std::size_t>(g) * size, size,
                                   routing.method == TopkMethod::kNoAuxTc));
  }
  w.kept.assign(w.choice.size(), -std::numeric_limits<float>::infinity());
  top(w.groups, routing.groups_kept, w.order);
  for (const std::int32_t g : w.order) {
    const std::size_t first = static_cast<std::size_t>(g) * size;
    std::copy_n(w.choice.begin() + static_cast<std::ptrdiff_t>(first), size,
                w.kept.begin() + static_cast<std::ptrdiff_t>(first));
  }
  std::swap(w.choice, w.kept);
}

}  // namespace

void choose_experts(const Routing& routing, const float* logits, const float* bias, std::int32_t* ids,
                    float* weights) {
  thread_local Workspace w;
  std::vector<float>& scores = w.scores;
  scores.resize(static_cast<std::size_t>(routing.num_experts));
  score(routing.scoring, logits, scores);
  w.choice = scores;
  if (bias != nullptr) {
    for (std::size_t e = 0; e < w.choice.size(); ++e) w.choice[e] += bias[e];
  }
  if (routing.method != TopkMethod::kGreedy) limit_to_groups(routing, w);

  top(w.choice, routing.experts_per_token, w.order);
  const std::vector<std::int32_t>& chosen = w.order;
  float sum = 0;
  for (const std::int32_t e : chosen) sum += scores[static_cast<std::size_t>(e)];
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const float weight = scores[static_cast<std::size_t>(chosen[i])];
    ids[i] = chosen[i];
    weights[i] = (routing.normalise ? weight / (sum + 1e-20f) : weight) * routing.scale;
  }
}

}  // namespace flash_mla::cpu
