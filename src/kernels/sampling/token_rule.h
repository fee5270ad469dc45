#pragma once

#include <cstdint>
#include <span>

namespace flash_mla {

/// What is added to the logit of a token.
struct TokenBias {
  std::int32_t token = 0;
  float bias = 0;
};

/// What changes a row of logits before its token is chosen: biases are added, and tokens that are not allowed get
/// -inf. Tokens outside the row are passed over.
struct TokenRule {
  /// A bit for each token of the row, bit t % 32 of word t / 32: it is allowed. Null: all are.
  const std::uint32_t* allowed = nullptr;
  std::span<const TokenBias> biases;  ///< in the order of tokens; those of one token are added in their order

  bool changes_nothing() const { return allowed == nullptr && biases.empty(); }
};

}  // namespace flash_mla
