#include "model/parallel/expert_placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/json.h"
#include "flash_mla/error.h"

namespace flash_mla::model {

ExpertPlacement::ExpertPlacement(const ModelConfig& config, int ranks, int ep, const std::string& how) {
  const int experts = config.n_routed_experts;
  layers_.resize(static_cast<std::size_t>(config.num_hidden_layers) + 1);
  if (how != "linear" && how != "round-robin") {
    read(config, ranks, how);
    return;
  }
  if (experts > 0 && ep > experts) {
    throw InvalidArgument(fmt::format("ep is {}, expected at most {}, the routed experts", ep, experts));
  }
  for (int layer = 0; layer <= config.num_hidden_layers; ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    auto& of_layer = layers_[static_cast<std::size_t>(layer)];
    of_layer.resize(static_cast<std::size_t>(experts));
    for (int e = 0; e < experts; ++e) {
      const int place = how == "linear" ? static_cast<int>(std::int64_t{e} * ep / experts) : e % ep;
      for (int rank = place; rank < ranks; rank += ep) of_layer[static_cast<std::size_t>(e)].push_back(rank);
    }
  }
}

void ExpertPlacement::read(const ModelConfig& config, int ranks, const std::filesystem::path& file) {
  const std::string path = file.string();
  const Json json = parse_json(read_file(file), path);
  const auto fail = [&](const std::string& key, const Json& value, const std::string& expected) {
    throw InvalidArgument(fmt::format("{}: {} = {}: expected {}", path, key, shown(value), expected));
  };
  const JsonObject layers = JsonObject(json, path).object("layers");
  for (int layer = 0; layer <= config.num_hidden_layers; ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    const auto found = layers.json().find(std::to_string(layer));
    if (found == layers.json().end()) {
      // A histogram of steps without the module's drafts lacks its layer.
      if (layer == config.num_hidden_layers && layer > 0) {
        layers_.back() = layers_[static_cast<std::size_t>(layer) - 1];
        continue;
      }
      throw InvalidArgument(fmt::format("{}: layers has no \"{}\", a mixture layer", path, layer));
    }
    const std::string key = fmt::format("layers.{}", layer);
    if (!found->is_array() || std::ssize(*found) != config.n_routed_experts) {
      fail(key, *found, fmt::format("{} lists of ranks, one for each expert", config.n_routed_experts));
    }
    auto& of_layer = layers_[static_cast<std::size_t>(layer)];
    for (const Json& list : *found) {
      const std::string of_expert = fmt::format("{}[{}]", key, of_layer.size());
      if (!list.is_array() || list.empty()) fail(of_expert, list, "a list of at least one rank");
      std::vector<int> of_one;
      for (const Json& rank : list) {
        if (!rank.is_number_integer() || rank < 0 || rank >= ranks) {
          fail(of_expert, rank, fmt::format("ranks from 0 to {}", ranks - 1));
        }
        of_one.push_back(rank.get<int>());
      }
      std::ranges::sort(of_one);
      if (std::ranges::adjacent_find(of_one) != of_one.end()) fail(of_expert, list, "every rank once");
      of_layer.push_back(std::move(of_one));
    }
  }
}

}  // namespace flash_mla::model
