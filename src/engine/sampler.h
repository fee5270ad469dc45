#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla::engine {

/// A row of logits that no token can be chosen from. Says what is wrong with it.
class BadLogits : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Tokens of a sequence, as far as its penalties need them.
class TokenHistory {
 public:
  TokenHistory(const SamplingParams& params, std::span<const std::int32_t> prompt);
  void add(std::int32_t token);

  /// Changes `logits` (vocab_size) by the penalties of `params`, which must be those of the constructor.
  void apply(const SamplingParams& params, std::span<float> logits) const;

 private:
  bool needed_ = false;
  std::unordered_map<std::int32_t, int> generated_;  // 0 for tokens of the prompt alone
};

/// Where a draw takes its randomness from: see uniform().
struct DrawKey {
  std::uint64_t seed = 0;
  std::uint32_t index = 0;
  std::uint64_t position = 0;
};

struct Sampled {
  std::int32_t token = -1;
  TokenLogprobs logprobs;  ///< filled if params.logprobs >= 0
};

/// Chooses a token. `logits` (vocab_size) is overwritten. -inf excludes a token. Throws BadLogits for NaN or
/// +inf, and if every token is excluded. One object per thread: it keeps scratch memory.
class Sampler {
 public:
  Sampled sample(const SamplingParams& params, const TokenHistory& history, const DrawKey& key,
                 std::span<float> logits);

 private:
  std::int32_t draw(const SamplingParams& params, const DrawKey& key, std::span<const float> logits);
  template <typename TokenOf>
  std::int32_t pick(double u, std::size_t count, const TokenOf& token_of) const;

  std::vector<std::int32_t> candidates_;
  std::vector<float> weights_;  // (vocab_size)
};

}  // namespace flash_mla::engine
