#include "kernels/sampling/cpu/draw.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/sampling/draw_weight.h"

namespace flash_mla::cpu {
namespace {

// The token of `count` ones, token_of(0) to token_of(count - 1), at which the sum of weights passes `target`.
template <typename TokenOf>
std::int32_t pick(const std::vector<std::uint64_t>& weights, std::uint64_t target, std::size_t count,
                  const TokenOf& token_of) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t token = token_of(i);
    sum += weights[static_cast<std::size_t>(token)];
    if (sum > target) return token;
  }
  return -1;  // not reached: target < the sum of all
}

/// Weights of a row into scratch, 0 for those below the least; their sum.
template <typename WeightOf>
std::uint64_t weigh(std::span<const float> values, const Draw& draw, DrawScratch& scratch,
                    const WeightOf& weight_of) {
  scratch.weights.resize(values.size());
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint64_t weight = weight_of(values[i]);
    scratch.weights[i] = weight >= draw.min_weight ? weight : 0;
    total += scratch.weights[i];
  }
  return total;
}

}  // namespace

Draw make_draw(double u, double temperature, int top_k, double top_p, double min_p) {
  Draw out;
  out.u = u;
  out.top_p = top_p;
  out.min_weight = std::max<std::uint64_t>(
      1, static_cast<std::uint64_t>(std::ceil(min_p * static_cast<double>(kDrawOne))));
  out.scale = static_cast<float>(1.0 / std::clamp(temperature, 1e-30, 1e30));
  out.top_k = top_k;
  return out;
}

void apply_rule(std::span<float> logits, const TokenRule& rule) {
  for (const auto& [token, bias] : rule.biases) {
    if (token >= 0 && static_cast<std::size_t>(token) < logits.size()) {
      logits[static_cast<std::size_t>(token)] += bias;
    }
  }
  if (rule.allowed == nullptr) return;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if ((rule.allowed[i / 32] >> (i % 32) & 1) == 0) logits[i] = -std::numeric_limits<float>::infinity();
  }
}

std::int32_t draw_token(std::span<const float> logits, float largest, const Draw& draw,
                        DrawScratch& scratch) {
  return draw_weighed(logits, draw, weigh_logits(logits, largest, draw, scratch), /*joint=*/false, scratch);
}

std::uint64_t weigh_logits(std::span<const float> logits, float largest, const Draw& draw,
                           DrawScratch& scratch) {
  return weigh(logits, draw, scratch, [&](float logit) { return draw_weight(logit - largest, draw.scale); });
}

std::uint64_t weigh_probabilities(std::span<const float> probabilities, float largest, const Draw& draw,
                                  DrawScratch& scratch) {
  return weigh(probabilities, draw, scratch, [&](float p) { return probability_weight(p, largest); });
}

std::int32_t draw_weighed(std::span<const float> values, const Draw& draw, std::uint64_t total, bool joint,
                          DrawScratch& scratch) {
  if (draw.top_k <= 0 && draw.top_p >= 1) {
    return pick(scratch.weights, draw_target(draw.u, total), values.size(),
                [](std::size_t i) { return static_cast<std::int32_t>(i); });
  }
  total = keep_likeliest(values, draw, total, joint, scratch);
  return pick(scratch.weights, draw_target(draw.u, total), scratch.candidates.size(),
              [&](std::size_t i) { return scratch.candidates[i]; });
}

std::uint64_t keep_likeliest(std::span<const float> values, const Draw& draw, std::uint64_t total, bool joint,
                             DrawScratch& scratch) {
  const std::vector<std::uint64_t>& weights = scratch.weights;
  std::vector<std::int32_t>& candidates = scratch.candidates;
  candidates.clear();
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (weights[i] > 0) candidates.push_back(static_cast<std::int32_t>(i));
  }
  // More likely first; of equals the smaller id, so that the order is total.
  const auto likelier = [&](std::int32_t a, std::int32_t b) {
    const float x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  const std::size_t most = draw.top_k > 0 ? static_cast<std::size_t>(draw.top_k) : candidates.size();
  const bool joint_cut = joint && draw.top_p < 1;  // top_p looks at what top_k is about to cut
  if (most < candidates.size() && !joint_cut) {
    std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(most - 1),
                     candidates.end(), likelier);
    candidates.resize(most);
    total = 0;
    for (const std::int32_t token : candidates) total += weights[static_cast<std::size_t>(token)];
  }
  if (draw.top_p < 1) {
    const std::uint64_t wanted = std::max<std::uint64_t>(1, part_of(draw.top_p, total));
    const std::size_t limit = std::min(most, candidates.size());
    // Sorted by likelihood only as far as needed: a few tokens usually hold most of the probability.
    std::uint64_t sum = 0;
    std::size_t kept = 0;
    for (std::size_t sorted = 0; sum < wanted && kept < limit;) {
      const std::size_t end = std::min(candidates.size(), std::max<std::size_t>(64, 4 * sorted));
      std::partial_sort(candidates.begin() + static_cast<std::ptrdiff_t>(sorted),
                        candidates.begin() + static_cast<std::ptrdiff_t>(end), candidates.end(), likelier);
      for (; kept < std::min(end, limit) && sum < wanted; ++kept) {
        sum += weights[static_cast<std::size_t>(candidates[kept])];
      }
      sorted = end;
    }
    candidates.resize(kept);
    total = sum;
  }
  std::sort(candidates.begin(), candidates.end());
  return total;
}

}  // namespace flash_mla::cpu
