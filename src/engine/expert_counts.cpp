#include "flash_mla/expert_counts.h"

#include <algorithm>
#include <numeric>

namespace flash_mla {
namespace {

/// Mean load and the largest, added up.
struct Load {
  double mean = 0, most = 0;

  void add(std::span<const std::int64_t> loads) {
    if (loads.empty()) return;
    const auto sum = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
    mean += static_cast<double>(sum) / static_cast<double>(loads.size());
    most += static_cast<double>(std::ranges::max(loads));
  }
  double balancedness() const { return most > 0 ? mean / most : 1; }
};

}  // namespace

std::int64_t ExpertCounts::total() const {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

int ExpertCounts::hottest() const {
  return static_cast<int>(std::ranges::max_element(counts) - counts.begin());
}

double ExpertCounts::hottest_share() const {
  const std::int64_t all = total();
  return all == 0 ? 0 : static_cast<double>(std::ranges::max(counts)) / static_cast<double>(all);
}

double balancedness(std::span<const std::int64_t> loads) {
  Load load;
  load.add(loads);
  return load.balancedness();
}

ExpertBalance balance_of(std::span<const ExpertCounts> layers) {
  Load experts, ranks;
  for (const ExpertCounts& layer : layers) {
    experts.add(layer.counts);
    ranks.add(layer.rank_counts);
  }
  return {experts.balancedness(), ranks.balancedness()};
}

}  // namespace flash_mla
