#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla::engine {

/// What a request says of single tokens: those it biases, those it excludes. One for all its continuations.
class LogitRules {
 public:
  LogitRules() = default;
  /// `end_tokens`: what ends a continuation, kept back until min_tokens.
  LogitRules(const SamplingParams& params, std::vector<std::int32_t> end_tokens);

  /// Whether they change the logits behind that many generated tokens.
  bool needed(std::int64_t num_generated) const { return always_ || num_generated < min_tokens_; }

  /// Changes `logits` (vocab_size), from which the token behind `generated` is chosen. -inf excludes a token;
  /// tokens outside the vocabulary are passed over.
  void apply(std::span<const std::int32_t> generated, std::span<float> logits) const;

 private:
  bool always_ = false;
  int min_tokens_ = 0;
  std::vector<std::int32_t> end_tokens_;
  std::vector<LogitBias> bias_;
  std::vector<std::int32_t> allowed_;  // sorted; empty: all
  std::vector<std::vector<std::int32_t>> bad_;
};

}  // namespace flash_mla::engine
