#include "server/experts.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace flash_mla::server {
namespace {

using Json = nlohmann::ordered_json;

Json layer_json(const ExpertCounts& layer) {
  return {{"layer", layer.layer},
          {"choices", layer.total()},
          {"balancedness", balancedness(layer.counts)},
          {"rank_balancedness", balancedness(layer.rank_counts)},
          {"hottest_expert", layer.hottest()},
          {"hottest_share", layer.hottest_share()},
          {"rank_counts", layer.rank_counts},
          {"counts", layer.counts}};
}

}  // namespace

std::string experts_json(std::span<const ExpertCounts> layers) {
  const ExpertBalance balance = balance_of(layers);
  Json out = {{"balancedness", balance.experts},
              {"rank_balancedness", balance.ranks},
              {"hottest_share", 0.0},
              {"layers", Json::array()}};
  for (const ExpertCounts& layer : layers) {
    out["hottest_share"] = std::max(out["hottest_share"].get<double>(), layer.hottest_share());
    out["layers"].push_back(layer_json(layer));
  }
  return out.dump();
}

}  // namespace flash_mla::server
