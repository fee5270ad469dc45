#include "planner/placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "planner/check.h"

namespace flash_mla::planner {
namespace {

using Json = nlohmann::ordered_json;
using Indices = std::vector<std::int64_t>;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// Items into `packs` of as many each: for every pack its items, in the order in which they came there.
std::vector<Indices> pack(std::span<const double> weight, std::int64_t packs) {
  const std::int64_t room = std::ssize(weight) / packs;
  Indices order(weight.size());
  std::iota(order.begin(), order.end(), 0);
  if (room > 1) {
    std::ranges::stable_sort(order,
                             [&](std::int64_t a, std::int64_t b) { return weight[at(a)] > weight[at(b)]; });
  }
  std::vector<Indices> out(at(packs));
  std::vector<double> sums(at(packs), 0);
  for (const std::int64_t item : order) {
    std::int64_t lightest = -1;
    for (std::int64_t p = 0; p < packs; ++p) {
      if (std::ssize(out[at(p)]) == room) continue;
      // Of one item each, the packs are filled in order.
      if (lightest < 0 || (room > 1 && sums[at(p)] < sums[at(lightest)])) lightest = p;
    }
    out[at(lightest)].push_back(item);
    sums[at(lightest)] += weight[at(item)];
  }
  return out;
}

/// Each expert once, in order, then a copy at a time of the one with the most load per copy.
Indices replicate(std::span<const double> load, std::int64_t slots, Indices& copies) {
  copies.assign(load.size(), 1);
  Indices out(load.size());
  std::iota(out.begin(), out.end(), 0);
  while (std::ssize(out) < slots) {
    std::int64_t busiest = 0;
    const auto per_copy = [&](std::int64_t e) { return load[at(e)] / static_cast<double>(copies[at(e)]); };
    for (std::int64_t e = 1; e < std::ssize(load); ++e) {
      if (per_copy(e) > per_copy(busiest)) busiest = e;
    }
    out.push_back(busiest);
    ++copies[at(busiest)];
  }
  return out;
}

/// The slots of `experts` on `gpus` GPUs, one GPU's behind the other's.
Indices fill_node(std::span<const double> all, const Indices& experts, std::int64_t slots,
                  std::int64_t gpus) {
  std::vector<double> load;
  for (const std::int64_t e : experts) load.push_back(all[at(e)]);
  Indices copies;
  const Indices replicas = replicate(load, slots, copies);
  std::vector<double> weight;
  for (const std::int64_t e : replicas) weight.push_back(load[at(e)] / static_cast<double>(copies[at(e)]));
  Indices out;
  for (const Indices& gpu : pack(weight, gpus)) {
    for (const std::int64_t slot : gpu) out.push_back(experts[at(replicas[at(slot)])]);
  }
  return out;
}

Indices by_load(std::span<const double> load, const PlacementOptions& o) {
  // Groups that do not divide among the nodes are left out of account.
  const bool by_group = o.groups % o.nodes == 0;
  const std::int64_t nodes = by_group ? o.nodes : 1, groups = by_group ? o.groups : 1;
  const std::int64_t size = std::ssize(load) / groups, slots = std::ssize(load) + o.copies;
  std::vector<double> group_load(at(groups), 0);
  for (std::int64_t e = 0; e < std::ssize(load); ++e) group_load[at(e / size)] += load[at(e)];
  Indices out;
  for (const Indices& node : pack(group_load, nodes)) {
    Indices experts;
    for (const std::int64_t group : node) {
      for (std::int64_t i = 0; i < size; ++i) experts.push_back(group * size + i);
    }
    const Indices filled = fill_node(load, experts, slots / nodes, o.gpus / nodes);
    out.insert(out.end(), filled.begin(), filled.end());
  }
  return out;
}

Indices round_robin(std::int64_t experts, std::int64_t gpus) {
  Indices out;
  for (std::int64_t gpu = 0; gpu < gpus; ++gpu) {
    for (std::int64_t e = gpu; e < experts; e += gpus) out.push_back(e);
  }
  return out;
}

void require_divides(const char* key, std::int64_t value, std::int64_t whole, const char* of) {
  if (value < 1 || whole % value != 0) {
    bad(key, std::to_string(value), fmt::format("a divisor of the {}, {}", of, whole));
  }
}

void check(std::span<const double> load, const PlacementOptions& o) {
  if (load.empty()) bad("counts", "empty", "those of at least one expert");
  for (const double count : load) {
    if (!std::isfinite(count) || count < 0) bad("counts", fmt::format("{}", count), "numbers of at least 0");
  }
  if (o.rule != "linear" && o.rule != "round_robin" && o.rule != "eplb") {
    bad("placement", o.rule, "linear, round_robin or eplb");
  }
  const std::int64_t experts = std::ssize(load);
  const std::int64_t most = o.rule == "eplb" ? std::int64_t{1} << 20 : 0;
  if (o.copies < 0 || o.copies > most) {
    bad("copies", std::to_string(o.copies),
        most > 0 ? fmt::format("0 to {}", most) : "0 without placement eplb");
  }
  require_divides("gpus", o.gpus, experts + o.copies, "experts and their copies");
  require_divides("nodes", o.nodes, o.gpus, "gpus");
  require_divides("groups", o.groups, experts, "experts");
}

void judge(std::span<const double> load, std::int64_t gpus, LayerPlacement& placement) {
  const std::vector<std::int64_t>& slots = placement.slots;
  std::vector<double> copies(load.size(), 0), sums(at(gpus), 0);
  for (const std::int64_t e : slots) ++copies[at(e)];
  const std::int64_t own = std::ssize(slots) / gpus;
  for (std::int64_t i = 0; i < std::ssize(slots); ++i) {
    sums[at(i / own)] += load[at(slots[at(i)])] / copies[at(slots[at(i)])];
  }
  const double all = std::accumulate(sums.begin(), sums.end(), 0.0), most = std::ranges::max(sums);
  placement.busiest_share = all > 0 ? most / all : 1 / static_cast<double>(gpus);
  placement.balancedness = all > 0 ? all / static_cast<double>(gpus) / most : 1;
}

Json parse_object(const std::string& text, const std::string& source) {
  Json out = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!out.is_object() || !out.contains("layers") || !out["layers"].is_array() || out["layers"].empty()) {
    bad(source, "no histogram",
        R"({"layers": [{"layer": 3, "counts": [...]}, ...]}, as GET /experts answers)");
  }
  return out;
}

}  // namespace

LayerPlacement place_experts(std::span<const double> load, const PlacementOptions& options) {
  check(load, options);
  LayerPlacement out;
  if (options.rule == "eplb") {
    out.slots = by_load(load, options);
  } else {
    // On one GPU as many as there are is in order, too.
    out.slots = round_robin(std::ssize(load), options.rule == "linear" ? 1 : options.gpus);
  }
  judge(load, options.gpus, out);
  return out;
}

std::vector<LayerLoad> read_histogram(const std::string& text, const std::string& source) {
  constexpr std::size_t kMostExperts = 65536;
  const Json file = parse_object(text, source);
  std::vector<LayerLoad> out;
  for (const Json& layer : file["layers"]) {
    const std::string key = fmt::format("{}: layers[{}]", source, out.size());
    LayerLoad& load = out.emplace_back();
    if (!layer.is_object() || !layer.contains("layer") || !layer["layer"].is_number_integer()) {
      bad(key + ".layer", "missing", "the layer's number");
    }
    load.layer = layer["layer"].get<std::int64_t>();
    const bool has_counts = layer.contains("counts") && layer["counts"].is_array();
    if (!has_counts || layer["counts"].empty() || layer["counts"].size() > kMostExperts) {
      bad(key + ".counts", has_counts ? fmt::format("{} entries", layer["counts"].size()) : "missing",
          fmt::format("an array of 1 to {} numbers", kMostExperts));
    }
    for (const Json& count : layer["counts"]) {
      if (!count.is_number() || !(count.get<double>() >= 0 && count.get<double>() <= 1e15)) {
        bad(key + ".counts", count.dump(), "numbers from 0 to 1e15");
      }
      load.load.push_back(count.get<double>());
    }
    if (load.load.size() != out.front().load.size()) {
      bad(key + ".counts", fmt::format("{} entries", load.load.size()),
          fmt::format("as many as the layers before, {}", out.front().load.size()));
    }
  }
  return out;
}

std::string plan_placement(std::span<const LayerLoad> layers, const PlacementOptions& options) {
  PlacementOptions in_order = options;
  in_order.rule = "linear";
  in_order.copies = 0;
  Json out = {{"placement", options.rule}, {"gpus", options.gpus},     {"copies", options.copies},
              {"nodes", options.nodes},    {"groups", options.groups}, {"layers", Json::array()}};
  for (const LayerLoad& layer : layers) {
    const LayerPlacement placement = place_experts(layer.load, options);
    Json entry = {{"layer", layer.layer},
                  {"counts", layer.load},
                  {"slots", placement.slots},
                  {"balancedness", placement.balancedness},
                  {"busiest_share", placement.busiest_share}};
    if (std::ssize(layer.load) % options.gpus == 0) {
      const LayerPlacement linear = place_experts(layer.load, in_order);
      entry["linear_balancedness"] = linear.balancedness;
    }
    out["layers"].push_back(std::move(entry));
  }
  return out.dump(1) + "\n";
}

}  // namespace flash_mla::planner
