#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/matrix.h"
#include "kernels/sampling/token_rule.h"

namespace flash_mla::sm90 {

/// A row of logits that has a TokenRule.
struct RuledRow {
  std::int32_t row = 0;
  std::int32_t mask = -1;  ///< row of TokenRules::masks; -1: all tokens are allowed
  std::int32_t first_bias = 0, num_biases = 0;
};

/// Rules of some rows. Pointers are the device's.
struct TokenRules {
  const RuledRow* rows = nullptr;  ///< (num_rows), each of `logits` at most once
  std::int64_t num_rows = 0;
  const std::uint32_t* masks = nullptr;  ///< (any, (columns + 31) / 32), as TokenRule::allowed
  const TokenBias* biases = nullptr;     ///< as TokenRule::biases, row after row
};

/// Changes rows of `logits` (float32, dense) as cpu::apply_rule does, but that NaN and +inf stay what they are where
/// tokens are not allowed: for likeliest() to find. Queued on `stream`; allocates nothing.
void apply_token_rules(Matrix logits, const TokenRules& rules, cudaStream_t stream);

}  // namespace flash_mla::sm90
