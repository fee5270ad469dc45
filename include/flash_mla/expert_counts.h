#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flash_mla {

/// How often the router of one mixture layer has chosen each of its experts since the model was loaded. Every token that
/// goes through the layer counts num_experts_per_tok times, drafts included. The last layer sees of a prompt only the tokens
/// whose logits are wanted.
struct ExpertCounts {
  int layer = 0;  ///< of the model; num_hidden_layers is that of the module for multi-token prediction
  std::vector<std::int64_t> counts;       ///< (n_routed_experts)
  std::vector<std::int64_t> rank_counts;  ///< (ranks): the choices that each rank has run

  /// All choices.
  std::int64_t total() const;
  /// The expert that was chosen most often, the first among equals.
  int hottest() const;
  /// Its part of all choices, in [0, 1]; 0: there are none.
  double hottest_share() const;
};

/// Mean load over the largest, in (0, 1]; 1 where there is no load.
double balancedness(std::span<const std::int64_t> loads);

/// The same of several layers: the sum of their mean loads over the sum of their largest ones, as vLLM's EPLB logs it
/// (vllm/distributed/eplb/eplb_state.py) over ranks. A step waits for the largest load of each layer in turn, so this is the
/// part of the time of the experts in which all are at work.
struct ExpertBalance {
  double experts = 1;  ///< of counts
  double ranks = 1;    ///< of rank_counts
};
ExpertBalance balance_of(std::span<const ExpertCounts> layers);

}  // namespace flash_mla
