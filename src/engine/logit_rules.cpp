#include "engine/logit_rules.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace flash_mla::engine {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

}  // namespace

LogitRules::LogitRules(const SamplingParams& params, std::vector<std::int32_t> end_tokens)
    : always_(!params.logit_bias.empty() || !params.allowed_token_ids.empty() ||
              !params.bad_token_ids.empty()),
      min_tokens_(params.min_tokens),
      end_tokens_(std::move(end_tokens)),
      bias_(params.logit_bias),
      allowed_(params.allowed_token_ids),
      bad_(params.bad_token_ids) {
  std::ranges::sort(allowed_);
}

void LogitRules::apply(std::span<const std::int32_t> generated, std::span<float> logits) const {
  const auto exclude = [&](std::int32_t token) {
    if (token >= 0 && static_cast<std::size_t>(token) < logits.size()) {
      logits[static_cast<std::size_t>(token)] = kExcluded;
    }
  };
  for (const auto& [token, bias] : bias_) {
    if (static_cast<std::size_t>(token) < logits.size()) {
      logits[static_cast<std::size_t>(token)] += static_cast<float>(bias);
    }
  }
  if (!allowed_.empty()) {
    std::size_t from = 0;
    for (const std::int32_t token : allowed_) {
      const std::size_t end = std::min(static_cast<std::size_t>(token), logits.size());
      if (from < end)
        std::fill(logits.begin() + static_cast<std::ptrdiff_t>(from),
                  logits.begin() + static_cast<std::ptrdiff_t>(end), kExcluded);
      from = static_cast<std::size_t>(token) + 1;
    }
    if (from < logits.size())
      std::fill(logits.begin() + static_cast<std::ptrdiff_t>(from), logits.end(), kExcluded);
  }
  for (const std::vector<std::int32_t>& run : bad_) {
    const std::size_t before = run.size() - 1;
    if (generated.size() >= before &&
        std::ranges::equal(generated.last(before), std::span(run).first(before))) {
      exclude(run.back());
    }
  }
  if (std::cmp_less(generated.size(), min_tokens_)) std::ranges::for_each(end_tokens_, exclude);
}

}  // namespace flash_mla::engine
