#include "engine/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/philox.h"
#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

// Index of the largest logit, the first among equals. Throws BadLogits.
std::int32_t checked_argmax(std::span<const float> logits) {
  float largest = -std::numeric_limits<float>::infinity();
  std::int32_t best = -1;
  bool bad = false;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    bad |= !(logits[i] < std::numeric_limits<float>::infinity());  // NaN, +inf
    if (logits[i] > largest) {
      largest = logits[i];
      best = static_cast<std::int32_t>(i);
    }
  }
  if (bad) {
    const auto it =
        std::ranges::find_if(logits, [](float x) { return !(x < std::numeric_limits<float>::infinity()); });
    throw BadLogits(
        fmt::format("the model's logit of token {} is {}, expected a finite number; weights or "
                    "cache may be damaged",
                    it - logits.begin(), *it));
  }
  if (best < 0) {
    throw BadLogits("no token is left: the model's logits, or what the request allows, exclude every one");
  }
  return best;
}

double log_sum_exp(std::span<const float> logits, float largest) {
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - largest);
  return largest + std::log(sum);
}

// More likely first; of equals the smaller id, so that the order is total.
struct Likelier {
  std::span<const float> logits;
  bool operator()(std::int32_t a, std::int32_t b) const {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  }
};

// The likeliest alone.
TokenLogprobs log_probabilities(std::span<const float> logits, double norm, int count,
                                std::vector<std::int32_t>& scratch) {
  TokenLogprobs out;
  const auto most = std::min(static_cast<std::size_t>(count), logits.size());
  scratch.resize(logits.size());
  std::iota(scratch.begin(), scratch.end(), 0);
  std::partial_sort(scratch.begin(), scratch.begin() + static_cast<std::ptrdiff_t>(most), scratch.end(),
                    Likelier{logits});
  for (std::size_t i = 0; i < most; ++i) {
    out.top.push_back({scratch[i], static_cast<float>(logits[static_cast<std::size_t>(scratch[i])] - norm)});
  }
  return out;
}

void complete(TokenLogprobs& out, std::span<const float> logits, double norm, std::int32_t token) {
  const float logit = logits[static_cast<std::size_t>(token)];
  out.chosen = {token, static_cast<float>(logit - norm)};
  out.rank = 1 + static_cast<std::int32_t>(std::ranges::count_if(logits, [&](float x) { return x > logit; }));
}

}  // namespace

TokenHistory::TokenHistory(const SamplingParams& params, std::span<const std::int32_t> prompt)
    : needed_(params.repetition_penalty != 1 || params.frequency_penalty != 0 ||
              params.presence_penalty != 0) {
  if (params.repetition_penalty == 1) return;
  for (const std::int32_t token : prompt) generated_.emplace(token, 0);
}

void TokenHistory::add(std::int32_t token) {
  if (needed_) ++generated_[token];
}

void TokenHistory::apply(const SamplingParams& params, std::span<float> logits) const {
  for (const auto& [token, count] : generated_) {
    float& x = logits[static_cast<std::size_t>(token)];
    double y = x > 0 ? x / params.repetition_penalty : x * params.repetition_penalty;
    if (count > 0) y -= params.frequency_penalty * count + params.presence_penalty;
    x = static_cast<float>(y);
  }
}

Draw draw_of(const SamplingParams& params, const DrawKey& key) {
  return cpu::make_draw(uniform(key.seed, key.index, key.position), params.temperature, params.top_k,
                        params.top_p, params.min_p);
}

TokenLogprobs Sampler::score(std::span<const float> logits, std::int32_t token, int count) {
  const std::int32_t best = checked_argmax(logits);
  const double norm = log_sum_exp(logits, logits[static_cast<std::size_t>(best)]);
  TokenLogprobs out = log_probabilities(logits, norm, count, order_);
  complete(out, logits, norm, token);
  return out;
}

Sampled Sampler::sample(const SamplingParams& params, const TokenHistory& history, const DrawKey& key,
                        std::span<float> logits, const LogitEdit& edit) {
  Sampled out;
  const std::int32_t best = checked_argmax(logits);
  double norm = 0;
  std::vector<float> raw;
  if (params.logprobs >= 0) {
    norm = log_sum_exp(logits, logits[static_cast<std::size_t>(best)]);
    out.logprobs = log_probabilities(logits, norm, params.logprobs, order_);
    raw.assign(logits.begin(), logits.end());
  }
  if (edit) edit(logits);
  history.apply(params, logits);
  out.token = checked_argmax(logits);
  if (params.temperature > 0) {
    const float largest = logits[static_cast<std::size_t>(out.token)];
    out.token = cpu::draw_token(logits, largest, draw_of(params, key), scratch_);
  }
  if (params.logprobs >= 0) complete(out.logprobs, raw, norm, out.token);
  return out;
}

}  // namespace flash_mla::engine
