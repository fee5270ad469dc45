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
  const std::size_t vocab_size = logits.size();
  std::vector<std::uint64_t>& weights = scratch.weights;
  weights.resize(vocab_size);
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < vocab_size; ++i) {
    const std::uint64_t weight = draw_weight(logits[i] - largest, draw.scale);
    weights[i] = weight >= draw.min_weight ? weight : 0;
    total += weights[i];
  }
  if (draw.top_k <= 0 && draw.top_p >= 1) {
    return pick(weights, draw_target(draw.u, total), vocab_size,
                [](std::size_t i) { return static_cast<std::int32_t>(i); });
  }

  std::vector<std::int32_t>& candidates = scratch.candidates;
  candidates.clear();
  for (std::size_t i = 0; i < vocab_size; ++i) {
    if (weights[i] > 0) candidates.push_back(static_cast<std::int32_t>(i));
  }
  const auto sum_of_candidates = [&] {
    std::uint64_t sum = 0;
    for (const std::int32_t token : candidates) sum += weights[static_cast<std::size_t>(token)];
    return sum;
  };
  // More likely first; of equals the smaller id, so that the order is total.
  const auto likelier = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  if (draw.top_k > 0 && static_cast<std::size_t>(draw.top_k) < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + (draw.top_k - 1), candidates.end(), likelier);
    candidates.resize(static_cast<std::size_t>(draw.top_k));
    total = sum_of_candidates();
  }
  if (draw.top_p < 1) {
    const std::uint64_t wanted = std::max<std::uint64_t>(1, part_of(draw.top_p, total));
    // Sorted by likelihood only as far as needed: a few tokens usually hold most of the probability.
    std::uint64_t sum = 0;
    std::size_t kept = 0;
    for (std::size_t sorted = 0; sum < wanted && kept < candidates.size();) {
      const std::size_t end = std::min(candidates.size(), std::max<std::size_t>(64, 4 * sorted));
      std::partial_sort(candidates.begin() + static_cast<std::ptrdiff_t>(sorted),
                        candidates.begin() + static_cast<std::ptrdiff_t>(end), candidates.end(), likelier);
      for (; kept < end && sum < wanted; ++kept) {
        sum += weights[static_cast<std::size_t>(candidates[kept])];
      }
      sorted = end;
    }
    candidates.resize(kept);
    total = sum;
  }
  std::sort(candidates.begin(), candidates.end());
  return pick(weights, draw_target(draw.u, total), candidates.size(),
              [&](std::size_t i) { return candidates[i]; });
}

}  // namespace flash_mla::cpu
