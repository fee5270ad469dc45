#include "planner/experts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "planner/check.h"

namespace flash_mla::planner {
namespace {

double num(std::int64_t value) { return static_cast<double>(value); }

/// C(pool - marked, draws) / C(pool, draws).
double miss(double pool, double marked, std::int64_t draws) {
  double p = 1;
  for (std::int64_t i = 0; i < draws; ++i) {
    const double d = static_cast<double>(i);
    p *= std::max(0.0, pool - marked - d) / (pool - d);
  }
  return p;
}

}  // namespace

ExpertTraffic expert_traffic(const std::vector<double>& load, std::int64_t k, std::int64_t ep,
                             double tokens) {
  double sum = 0;
  for (double count : load) sum += count;
  ExpertTraffic worst{0, 0};
  const std::size_t local = load.size() / static_cast<std::size_t>(ep);
  for (std::size_t card = 0; card < static_cast<std::size_t>(ep); ++card) {
    double touched = 0, share = 0;
    for (std::size_t i = card * local; i < (card + 1) * local; ++i) {
      const double p = std::min(1.0, num(k) * load[i] / sum);
      touched += 1 - std::pow(1 - p, tokens);
      share += load[i] / sum;
    }
    worst.touched = std::max(worst.touched, touched);
    worst.load = std::max(worst.load, share * num(ep));
  }
  return worst;
}

double expected_ranks(const Model& m, std::int64_t ep, const std::string& placement) {
  const double experts = num(m.num_routed_experts), k_experts = experts / num(ep);
  const std::int64_t k = m.num_experts_per_token;
  if (placement == "uniform" || m.n_group == 1) return num(ep) * (1 - miss(experts, k_experts, k));
  const double chosen =
      experts / num(m.n_group) * num(m.topk_group);  // experts of the groups a token may use
  if (placement == "round_robin") return num(ep) * (1 - miss(chosen, chosen / num(ep), k));
  if (ep >= m.n_group) {
    if (ep % m.n_group != 0) {
      bad("workload.placement", "linear",
          fmt::format("ep = {} to be a multiple of n_group = {}", ep, m.n_group));
    }
    return num(m.topk_group * (ep / m.n_group)) * (1 - miss(chosen, k_experts, k));
  }
  if (m.n_group % ep != 0) {
    bad("workload.placement", "linear", fmt::format("ep = {} to divide n_group = {}", ep, m.n_group));
  }
  // Each rank holds several groups, j of which are among the chosen ones (hypergeometric).
  const std::int64_t held = m.n_group / ep;
  auto choose = [](std::int64_t a, std::int64_t b) {
    double c = b <= a ? 1 : 0;
    for (std::int64_t i = 0; i < b && c > 0; ++i) c *= num(a - i) / num(i + 1);
    return c;
  };
  double untouched = 0;
  for (std::int64_t j = 0; j <= std::min(held, m.topk_group); ++j) {
    const double p =
        choose(held, j) * choose(m.n_group - held, m.topk_group - j) / choose(m.n_group, m.topk_group);
    untouched += p * miss(chosen, num(j) * experts / num(m.n_group), k);
  }
  return num(ep) * (1 - untouched);
}

}  // namespace flash_mla::planner
