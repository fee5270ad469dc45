#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sampling/draw.h"
#include "model/model.h"

namespace flash_mla::model {

/// Which pages hold one sequence, and which of the step's tokens are its new ones.
struct Chunk {
  std::int64_t first_token = 0;
  std::int64_t num_tokens = 0;
  std::int64_t seq_len = 0;  ///< with this step's tokens
  std::vector<std::int32_t> pages;
};

/// The states that a step of the module for multi-token prediction reads beside its tokens.
enum class ModuleStates {
  kNone,    ///< the step is the model's
  kModels,  ///< of the tokens of the model's last step
  kOwn,     ///< of the logit rows of the module's last application
};

/// What a step is, on the host. Its tokens are ordered so that those that take the absorbed form of
/// attention come first; each of them is a request of its own there.
struct Step {
  std::vector<std::int32_t> token_ids;  ///< (num_tokens); -1 - i: the i-th of the tokens that embed is given
  std::vector<std::int32_t> positions;  ///< (num_tokens)
  std::vector<std::int64_t> slots;      ///< (num_tokens): page * kPageSize + offset

  std::vector<std::int32_t> order;  ///< (num_tokens): of the batch's tokens, their places here

  std::int64_t num_absorbed = 0;
  std::int64_t max_blocks = 1;
  std::vector<std::int32_t> absorbed_lens;   ///< (num_absorbed): keys the token sees
  std::vector<std::int32_t> absorbed_table;  ///< (num_absorbed, max_blocks): pages

  std::vector<Chunk> chunks;  ///< the sequences behind them, in the un-absorbed form

  std::vector<std::int32_t> logit_rows;  ///< tokens whose logits are wanted, then those of first_chosen on:
  std::int64_t first_chosen = 0;         ///< of them only a token is
  std::vector<Draw> draws;               ///< (logit_rows), which is drawn where a scale is set; or empty
  ModuleStates reads = ModuleStates::kNone;
  std::vector<std::int32_t>
      states;           ///< (num_tokens), if it reads any: the row of the state that goes with each
  bool masked = false;  ///< tokens are chosen by Device::choose_among
  bool batch_invariant = false;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(token_ids.size()); }
};

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
