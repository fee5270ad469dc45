#include "engine/logit_rules.h"

#include <algorithm>
#include <utility>

namespace flash_mla::engine {
LogitRules::LogitRules(const SamplingParams& params, std::vector<std::int32_t> end_tokens)
    : always_(!params.logit_bias.empty() || !params.allowed_token_ids.empty() ||
              !params.bad_token_ids.empty()),
      min_tokens_(params.min_tokens),
      end_tokens_(std::move(end_tokens)),
      allowed_(params.allowed_token_ids),
      bad_(params.bad_token_ids) {
  std::ranges::sort(allowed_);
  for (const LogitBias& b : params.logit_bias) biases_.push_back({b.token, static_cast<float>(b.bias)});
  std::ranges::stable_sort(biases_, {}, &TokenBias::token);
}

bool LogitRules::excludes(std::span<const std::int32_t> generated) const {
  return !allowed_.empty() || !bad_.empty() || std::cmp_less(generated.size(), min_tokens_);
}

void LogitRules::exclude(std::span<const std::int32_t> generated, std::span<std::uint32_t> allowed) const {
  const auto bit = [&](std::int32_t token) { return 1U << (static_cast<std::uint32_t>(token) % 32); };
  const auto word = [&](std::int32_t token) { return static_cast<std::size_t>(token) / 32; };
  const auto exclude_one = [&](std::int32_t token) {
    if (token >= 0 && word(token) < allowed.size()) allowed[word(token)] &= ~bit(token);
  };
  if (!allowed_.empty()) {
    std::size_t next = 0;  // word
    std::uint32_t bits = 0;
    for (const std::int32_t token : allowed_) {
      if (word(token) >= allowed.size()) break;
      for (; next < word(token); ++next, bits = 0) allowed[next] &= bits;
      bits |= bit(token);
    }
    for (; next < allowed.size(); ++next, bits = 0) allowed[next] &= bits;
  }
  for (const std::vector<std::int32_t>& run : bad_) {
    const std::size_t before = run.size() - 1;
    if (generated.size() >= before &&
        std::ranges::equal(generated.last(before), std::span(run).first(before))) {
      exclude_one(run.back());
    }
  }
  if (std::cmp_less(generated.size(), min_tokens_)) std::ranges::for_each(end_tokens_, exclude_one);
}

}  // namespace flash_mla::engine
