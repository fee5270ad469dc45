#pragma once

namespace flash_mla {

/// What turns a router's logits into scores.
enum class ScoringFunc { kSoftmax, kSigmoid };

/// How a token's experts are chosen from its scores.
enum class TopkMethod {
  kGreedy,              ///< V2-Lite: the top num_experts_per_tok of all
  kGroupLimitedGreedy,  ///< V2: the best topk_group groups by their best expert, then the top of those
  kNoAuxTc,             ///< V3: bias-corrected scores choose; groups by the sum of their two best
};

}  // namespace flash_mla
