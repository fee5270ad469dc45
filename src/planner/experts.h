#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flash_mla/planner.h"

// How a token's experts spread over cards.

namespace flash_mla::planner {

struct ExpertTraffic {
  double touched;  ///< distinct experts with a token, on the card that has most of them
  double load;     ///< the fullest card's tokens over the mean
};
/// From a measured histogram of tokens per routed expert, placed in order over `ep` cards.
ExpertTraffic expert_traffic(const std::vector<double>& load, std::int64_t k, std::int64_t ep, double tokens);

/// Expected number of distinct EP ranks that one token's experts lie on. "uniform" draws k of all experts;
/// "linear" and "round_robin" draw them from topk_group of n_group groups, as DeepSeek's router does.
double expected_ranks(const Model& model, std::int64_t ep, const std::string& placement);

}  // namespace flash_mla::planner
