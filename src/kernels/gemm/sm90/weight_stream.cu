#include <algorithm>
#include <cmath>
#include <limits>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/weight_stream.cuh"

namespace flash_mla::sm90 {
namespace {

// What a multiprocessor's share of a product costs. Fitted to the times of all divisions of V2-Lite's and
// V3's products (docs/kernels/skinny-gemm-sm90.md): the choice costs 2% on average against the best division,
// and the single numbers mean little. Bytes and microseconds.
struct Costs {
  double rate[2];      ///< with one CTA on a multiprocessor and with two
  double latency;      ///< the bytes on their way over this bound the rate
  double row_byte;     ///< a byte of x beside one of the weights
  double shared_byte;  ///< a byte of the sums that a cluster exchanges
  double round;        ///< an item of every CTA
  double doubling;     ///< of the cluster
};
constexpr Costs kFewRows = {{22.2e3, 26.0e3}, 1.75, 3.6, 1.5, 17.6, 0.3};  // up to 16 rows of x
constexpr Costs kManyRows = {{30.9e3, 30.0e3}, 1.18, 0.22, 1.2, 5.3, 1.25};
// Widening, not bytes, is what e4m3 pays for then: 6% on average against the best division. Of int4 the same is taken,
// by weights of a byte.
constexpr Costs kManyRowsE4m3 = {{22.2e3, 22.2e3}, 0.96, 0.80, 0.42, 9.4, 1.1};

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class Shape>
cudaError_t launch_shape(const WeightStream& args, const StreamPlan& plan, int num_sms, cudaStream_t stream) {
  if (const cudaError_t e = allow_shared_memory<stream_weights<Shape>>(Shape::kSharedBytes)) return e;
  const int unit = Shape::kE4m3 || Shape::kInt4 ? 8 : 4;
  if (plan.width * (args.silu_mul ? 2 : 1) > Shape::kRows || plan.width % unit != 0)
    return cudaErrorInvalidValue;
  StreamGrid grid{};
  grid.row_tiles = divide_up(args.silu_mul ? args.n / 2 : args.n, plan.width);
  grid.row_groups = divide_up(args.m, 8 * Shape::kGroups);
  grid.width = plan.width;
  grid.cluster = plan.cluster;
  const bool experts = args.units != nullptr || args.direct_ids != nullptr;
  const std::int64_t items = grid.row_tiles * (experts ? args.max_units : grid.row_groups);
  const std::int64_t clusters =
      std::min<std::int64_t>(items, std::max(1, num_sms * plan.ctas_per_sm / plan.cluster));
  LaunchConfig config(static_cast<unsigned>(clusters * plan.cluster), Shape::kThreads, Shape::kSharedBytes,
                      stream);
  config.cluster(static_cast<unsigned>(plan.cluster)).programmatic(args.programmatic_launch);
  return launch(config, stream_weights<Shape>, args, grid);
}

struct TableEntry {
  StreamPlan plan;  // groups, tiles and warps
  StreamWeight weight;
  int flight;  // bytes on their way for each row of the weights
  cudaError_t (*launch)(const WeightStream&, const StreamPlan&, int, cudaStream_t);
};

StreamWeight weight_of(const WeightStream& args) {
  return args.weight_int4         ? StreamWeight::kInt4
         : args.weight_fp32       ? StreamWeight::kFp32
         : args.scales != nullptr ? StreamWeight::kE4m3
                                  : StreamWeight::kBf16;
}

template <int kGroups, int kTiles, int kWarpsN, int kWarpsK, StreamWeight kWeight>
constexpr TableEntry entry() {
  using Shape = StreamShape<kGroups, kTiles, kWarpsN, kWarpsK, kWeight>;
  return {{kGroups, kTiles, kWarpsN, kWarpsK, 0, 0, 0},
          kWeight,
          Shape::kDepth * kWarpsK * Shape::kChunks * 32 / kTiles,
          launch_shape<Shape>};
}

// Of equals the plan takes the first: fewer tiles make a deeper ring.
constexpr TableEntry kTable[] = {
    entry<1, 1, 1, 4, StreamWeight::kBf16>(), entry<1, 2, 1, 4, StreamWeight::kBf16>(),
    entry<1, 3, 1, 4, StreamWeight::kBf16>(), entry<1, 4, 1, 4, StreamWeight::kBf16>(),
    entry<2, 1, 1, 4, StreamWeight::kBf16>(), entry<2, 2, 1, 4, StreamWeight::kBf16>(),
    entry<2, 3, 1, 4, StreamWeight::kBf16>(), entry<2, 4, 1, 4, StreamWeight::kBf16>(),
    entry<4, 2, 1, 4, StreamWeight::kBf16>(), entry<4, 4, 1, 4, StreamWeight::kBf16>(),
    entry<4, 4, 2, 2, StreamWeight::kBf16>(), entry<8, 2, 1, 4, StreamWeight::kBf16>(),
    entry<8, 3, 1, 4, StreamWeight::kBf16>(), entry<8, 4, 2, 2, StreamWeight::kBf16>(),
    entry<1, 1, 1, 4, StreamWeight::kFp32>(), entry<2, 1, 1, 4, StreamWeight::kFp32>(),
    entry<4, 1, 1, 4, StreamWeight::kFp32>(), entry<8, 1, 1, 4, StreamWeight::kFp32>(),
    entry<1, 1, 1, 4, StreamWeight::kE4m3>(), entry<1, 2, 1, 4, StreamWeight::kE4m3>(),
    entry<1, 3, 1, 4, StreamWeight::kE4m3>(), entry<1, 4, 1, 4, StreamWeight::kE4m3>(),
    entry<2, 1, 1, 4, StreamWeight::kE4m3>(), entry<2, 2, 1, 4, StreamWeight::kE4m3>(),
    entry<2, 3, 1, 4, StreamWeight::kE4m3>(), entry<2, 4, 1, 4, StreamWeight::kE4m3>(),
    entry<4, 1, 1, 4, StreamWeight::kE4m3>(), entry<4, 2, 1, 4, StreamWeight::kE4m3>(),
    entry<4, 4, 1, 4, StreamWeight::kE4m3>(), entry<4, 4, 2, 2, StreamWeight::kE4m3>(),
    entry<8, 1, 1, 4, StreamWeight::kE4m3>(), entry<8, 2, 1, 4, StreamWeight::kE4m3>(),
    entry<8, 2, 2, 2, StreamWeight::kE4m3>(), entry<8, 4, 2, 2, StreamWeight::kE4m3>(),
    entry<1, 1, 1, 4, StreamWeight::kInt4>(), entry<1, 2, 1, 4, StreamWeight::kInt4>(),
    entry<1, 4, 1, 4, StreamWeight::kInt4>(), entry<1, 6, 1, 4, StreamWeight::kInt4>(),
    entry<2, 1, 1, 4, StreamWeight::kInt4>(), entry<2, 2, 1, 4, StreamWeight::kInt4>(),
    entry<2, 4, 1, 4, StreamWeight::kInt4>(), entry<4, 2, 1, 4, StreamWeight::kInt4>(),
    entry<4, 4, 1, 4, StreamWeight::kInt4>(), entry<4, 4, 2, 2, StreamWeight::kInt4>(),
    entry<8, 2, 1, 4, StreamWeight::kInt4>(), entry<8, 2, 2, 2, StreamWeight::kInt4>(),
    entry<8, 4, 2, 2, StreamWeight::kInt4>(),
};

/// Microseconds, but for a constant; sets plan.width to the best.
double cost_of(const WeightStream& args, const TableEntry& entry, StreamPlan& plan, std::int64_t units,
               std::int64_t rows, int num_sms) {
  const int halves = args.silu_mul ? 2 : 1;
  const int capacity = 16 * plan.tiles * plan.warps_n / halves;
  const std::int64_t outputs = args.n / halves;
  const std::int64_t slots = std::max(1, num_sms * plan.ctas_per_sm / plan.cluster);
  const double k = static_cast<double>(divide_up(divide_up(args.k, 64), plan.cluster) * 64);
  const Costs& costs = plan.groups <= 2 ? kFewRows : args.scales != nullptr ? kManyRowsE4m3 : kManyRows;
  const bool few_int4 = args.weight_int4 && plan.groups <= 2;  // with their scales
  const double weight_bytes = args.weight_fp32 ? 4 : few_int4 ? 0.5625 : args.scales != nullptr ? 1 : 2;
  const std::int64_t unit = args.scales != nullptr ? 8 : 4;  // of widths
  double best = std::numeric_limits<double>::infinity();
  const auto consider = [&](std::int64_t width) {
    const std::int64_t items = divide_up(outputs, width) * units;
    const std::int64_t together =
        std::clamp<std::int64_t>(divide_up(items * plan.cluster, num_sms), 1, plan.ctas_per_sm);
    const double weight_rows = static_cast<double>(width * halves);
    const double x_rows = static_cast<double>(rows);
    const double bytes = k * (weight_rows * weight_bytes + x_rows * 2 * costs.row_byte) +
                         (plan.cluster > 1 ? weight_rows * x_rows * 4 * costs.shared_byte : 0);
    const double flight = weight_rows * entry.flight * static_cast<double>(together);
    const double rate = std::min(costs.rate[plan.ctas_per_sm - 1], flight / costs.latency);
    const double cost = static_cast<double>(divide_up(items, slots)) *
                        (static_cast<double>(together) * bytes / rate + costs.round +
                         costs.doubling * std::log2(static_cast<double>(plan.cluster)));
    if (cost >= best) return;
    best = cost;
    plan.width = static_cast<int>(width);
  };
  consider(capacity);
  // Widths that fill a whole number of rounds.
  const std::int64_t first = std::max<std::int64_t>(1, outputs * units / (slots * capacity));
  for (std::int64_t rounds = first; rounds < first + 3; ++rounds) {
    const std::int64_t tiles = std::max<std::int64_t>(1, slots * rounds / units);
    const std::int64_t width = divide_up(divide_up(outputs, tiles), unit) * unit;
    if (width <= capacity) consider(width);
  }
  return best;
}

/// Calls visit(plan, cost) for every division that the product allows.
template <class F>
void for_plans(const WeightStream& args, int num_sms, F&& visit) {
  const bool experts = args.units != nullptr || args.direct_ids != nullptr;
  const std::int64_t bound = experts ? args.rows_per_unit : args.m;
  const int groups = bound <= 8 ? 1 : bound <= 16 ? 2 : bound <= 32 ? 4 : 8;
  const std::int64_t rows = std::min<std::int64_t>(args.m, 8 * groups);
  const std::int64_t units =
      experts ? std::max<std::int64_t>(args.likely_units, 1) : divide_up(args.m, 8 * groups);
  int fixed_cluster = 0;
  if (args.batch_invariant) {  // what the sums depend on is that of a single row
    WeightStream single = args;
    single.batch_invariant = false;
    single.units = nullptr;
    single.direct_ids = nullptr;
    single.m = 1;
    fixed_cluster = plan_stream(single, num_sms).cluster;
  }
  for (const TableEntry& e : kTable) {
    if (e.plan.groups != groups || e.weight != weight_of(args)) continue;
    if (args.batch_invariant && e.plan.warps_k != 4) continue;
    for (const int cluster : {1, 2, 4, 8}) {
      if (cluster > 1 && args.k < 64 * e.plan.warps_k * cluster) continue;
      if (fixed_cluster > 0 && cluster != fixed_cluster) continue;
      for (int per_sm = 1; per_sm <= 2; ++per_sm) {
        StreamPlan plan = e.plan;
        plan.cluster = cluster;
        plan.ctas_per_sm = per_sm;
        const double cost = cost_of(args, e, plan, units, rows, num_sms);
        visit(plan, cost);
      }
    }
  }
}

}  // namespace

bool fits_stream(const void* x, std::int64_t x_stride, const void* weight, std::int64_t k, bool scaled) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return k > 0 && k % (scaled ? 16 : 8) == 0 && x_stride % 8 == 0 && aligned(x) && aligned(weight);
}

StreamPlan plan_stream(const WeightStream& args, int num_sms) {
  StreamPlan best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for_plans(args, num_sms, [&](const StreamPlan& plan, double cost) {
    if (cost < best_cost) {
      best_cost = cost;
      best = plan;
    }
  });
  return best;
}

std::vector<StreamPlan> stream_plans(const WeightStream& args, int num_sms) {
  std::vector<StreamPlan> plans;
  for_plans(args, num_sms, [&](const StreamPlan& plan, double) { plans.push_back(plan); });
  return plans;
}

cudaError_t launch_stream(const WeightStream& args, const StreamPlan& plan, cudaStream_t stream) {
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  for (const TableEntry& e : kTable) {
    if (e.plan.groups == plan.groups && e.plan.tiles == plan.tiles && e.plan.warps_n == plan.warps_n &&
        e.plan.warps_k == plan.warps_k && e.weight == weight_of(args)) {
      return e.launch(args, plan, num_sms, stream);
    }
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_stream(const WeightStream& args, cudaStream_t stream) {
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  return launch_stream(args, plan_stream(args, num_sms), stream);
}

}  // namespace flash_mla::sm90
