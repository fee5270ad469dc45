#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flash_mla/engine.h"
#include "model/model.h"

namespace flash_mla::engine {

/// What a request says of single tokens: those it biases, those it excludes. One for all its continuations.
class LogitRules {
 public:
  LogitRules() = default;
  /// `end_tokens`: what ends a continuation, kept back until min_tokens.
  LogitRules(const SamplingParams& params, std::vector<std::int32_t> end_tokens);

  /// Whether they change the logits behind that many generated tokens.
  bool needed(std::int64_t num_generated) const { return always_ || num_generated < min_tokens_; }

  /// Whether they exclude tokens behind `generated`.
  bool excludes(std::span<const std::int32_t> generated) const;
  /// Clears the bits of `allowed` (a bit for each token of the vocabulary, as TokenRule has it) of the tokens that they
  /// exclude behind `generated`. Tokens outside the vocabulary are passed over.
  void exclude(std::span<const std::int32_t> generated, std::span<std::uint32_t> allowed) const;
  /// In the order of tokens.
  std::span<const TokenBias> biases() const { return biases_; }

 private:
  bool always_ = false;
  int min_tokens_ = 0;
  std::vector<std::int32_t> end_tokens_;
  std::vector<TokenBias> biases_;
  std::vector<std::int32_t> allowed_;  // sorted; empty: all
  std::vector<std::vector<std::int32_t>> bad_;
};

}  // namespace flash_mla::engine
