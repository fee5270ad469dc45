#pragma once

#include "model/model.h"
#include "model/ops.h"

namespace flash_mla::model {

/// Sequences with at most this many new tokens take the absorbed form of attention, in a batch-invariant step
/// all of them.
inline constexpr int kMaxAbsorbedTokens = 16;

/// What a batch is checked against.
struct StepLimits {
  int vocab_size = 0;
  std::int64_t max_position = 0;
  int num_pages = 0;
  std::int64_t num_tokens_before = 0;  ///< that the step before has chosen
};

/// Checks a batch and orders its tokens for the device. Throws InvalidArgument.
Step plan_step(const ForwardBatch& batch, const StepLimits& limits);

/// What is left of a step once its tokens are in the cache of the last layer: the rows whose logits are
/// wanted, in that order, each a token of the absorbed form.
Step logit_step(const Step& step);

}  // namespace flash_mla::model
