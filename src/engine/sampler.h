#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "flash_mla/engine.h"
#include "kernels/sampling/cpu/draw.h"

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

/// What is drawn at `key` with `params`, whose temperature is > 0.
Draw draw_of(const SamplingParams& params, const DrawKey& key);

struct Sampled {
  std::int32_t token = -1;
  TokenLogprobs logprobs;  ///< filled if params.logprobs >= 0
};

/// Changes logits before penalties.
using LogitEdit = std::function<void(std::span<float>)>;

/// Chooses a token. `logits` (vocab_size) is overwritten. -inf excludes a token. Throws BadLogits for NaN or
/// +inf, and if every token is excluded. One object per thread: it keeps scratch memory.
class Sampler {
 public:
  /// `edit`, if there is one, does not touch log-probabilities: they are the model's own.
  Sampled sample(const SamplingParams& params, const TokenHistory& history, const DrawKey& key,
                 std::span<float> logits, const LogitEdit& edit = {});
  /// Of a token that is given, and of the `count` likeliest.
  TokenLogprobs score(std::span<const float> logits, std::int32_t token, int count);

 private:
  std::vector<std::int32_t> order_;
  cpu::DrawScratch scratch_;
};

}  // namespace flash_mla::engine
