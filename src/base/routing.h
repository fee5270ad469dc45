#pragma once

// How a mixture layer chooses the experts of a token from its router's logits: what a model's configuration
// says and every backend's kernels follow.

namespace flash_mla {

enum class ScoringFunc { kSoftmax, kSigmoid };

/// How a token's experts are chosen from its scores.
enum class TopkMethod {
  kGreedy,              ///< V2-Lite: the experts_per_token best of all
  kGroupLimitedGreedy,  ///< V2: the groups_kept best groups by their best expert, then the best of those
  kNoAuxTc,             ///< V3: bias-corrected scores choose; groups by the sum of their two best
};

struct Routing {
  int num_experts = 0;                  ///< routed ones, divisible by num_groups
  int experts_per_token = 0;            ///< of the routed ones
  int shared_experts = 0;               ///< that every token takes besides
  int num_groups = 1, groups_kept = 1;  ///< n_group and topk_group; unused when greedy
  ScoringFunc scoring = ScoringFunc::kSoftmax;
  TopkMethod method = TopkMethod::kGreedy;
  bool normalise = false;  ///< norm_topk_prob
  float scale = 1.0f;      ///< routed_scaling_factor
};

}  // namespace flash_mla
