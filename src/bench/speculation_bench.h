#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "model/model.h"

namespace flash_mla::bench {

struct SpeculationBenchOptions {
  std::vector<int> batch;         ///< sequences per step
  std::vector<int> context;       ///< cached tokens of each
  std::vector<int> draft_tokens;  ///< drafts of each and step
  double acceptance = 0.8;        ///< chance of a draft whose predecessors were accepted
  int steps = 30;                 ///< of which the median is taken
  int generated = 64;             ///< tokens per request of the engine
};

/// What drafts of a model's module cost and bring: steps that check them beside plain steps, the module alone, and
/// generation by the engine without drafts, with them and with `auto`. Random weights would accept next to none, so
/// that it is simulated: a draft is the model's token with the chance that the options say. Prints tables and adds to
/// `out`. The model has a module, and a cache of batch * pages_per_sequence pages whose contents do not matter.
void bench_speculation(model::Model& model, const SpeculationBenchOptions& options, int pages_per_sequence,
                       nlohmann::ordered_json& out);

}  // namespace flash_mla::bench
