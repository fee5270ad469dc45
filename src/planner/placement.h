#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

// Which GPU holds which experts, from how often each was chosen.

namespace flash_mla::planner {

struct PlacementOptions {
  /// "linear": in order, as many on each GPU. "round_robin": expert e on GPU e mod gpus. "eplb": by load, with copies of
  /// the busiest (DeepSeek's rules; see place_experts).
  std::string rule = "eplb";
  std::int64_t gpus = 1;
  std::int64_t copies = 0;  ///< slots besides one for each expert; with "eplb" alone
  std::int64_t nodes = 1;   ///< hosts, of as many GPUs each
  std::int64_t groups =
      1;  ///< of experts (n_group); where they divide among the nodes, a group's stay on one
};

struct LayerPlacement {
  /// The expert in every slot, one GPU's slots behind the other's.
  std::vector<std::int64_t> slots;
  /// Mean load of a GPU over that of the busiest, in (0, 1], and the busiest one's share of all; the load of an expert is
  /// divided equally among its copies.
  double balancedness = 1, busiest_share = 1;
};

/// Places a layer's experts, of which expert e has been chosen load[e] times.
///
/// "eplb" is what DeepSeek published with V3: copies are given one by one to the expert with the most load per copy; slots
/// are packed heaviest first, each onto the lightest GPU that has room. Where groups divide among nodes, groups are
/// packed onto nodes in the same way first, and each node is then treated by itself.
///
/// Throws InvalidArgument naming the option, for loads that are negative or not finite, and where slots, GPUs, nodes and
/// groups do not divide.
LayerPlacement place_experts(std::span<const double> load, const PlacementOptions& options);

/// A layer's counts and its number in the model.
struct LayerLoad {
  std::int64_t layer = 0;
  std::vector<double> load;
};

/// Reads {"layers": [{"layer": 3, "counts": [...]}, ...]}, what GET /experts answers and plan_placement writes. `source`
/// names it in messages. Throws InvalidArgument; layers have as many experts each, 1 to 65536.
std::vector<LayerLoad> read_histogram(const std::string& text, const std::string& source);

/// All layers' placements as JSON: the options, and for every layer its number, its counts, its experts in `slots`,
/// `balancedness` and `busiest_share`, those of linear placement beside them. Throws as place_experts.
std::string plan_placement(std::span<const LayerLoad> layers, const PlacementOptions& options);

}  // namespace flash_mla::planner
