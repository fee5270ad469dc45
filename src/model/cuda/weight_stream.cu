#include <algorithm>
#include <limits>

#include "model/cuda/launch.h"
#include "model/cuda/weight_stream.cuh"

namespace flash_mla::model::cuda {
namespace {

// What a CTA costs besides its weights, in bytes of weights read in the same time: start, sums, end.
constexpr double kCtaOverheadBytes = 12 << 10;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class Shape>
cudaError_t launch_shape(const WeightStream& args, int cluster, cudaStream_t stream) {
  if (const cudaError_t e = allow_shared_memory<stream_weights<Shape>>(Shape::kSharedBytes)) return e;
  const std::int64_t width = args.silu_mul ? Shape::kRows / 2 : Shape::kRows;
  StreamGrid grid{};
  grid.row_tiles = divide_up(args.silu_mul ? args.n / 2 : args.n, width);
  grid.row_groups = divide_up(args.m, 8 * Shape::kGroups);
  grid.cluster = cluster;
  const bool experts = args.units != nullptr || args.direct_ids != nullptr;
  const std::int64_t parts = grid.row_tiles * (experts ? args.max_units : grid.row_groups);
  if (parts * cluster > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  LaunchConfig config(static_cast<unsigned>(parts * cluster), Shape::kThreads, Shape::kSharedBytes, stream);
  config.cluster(static_cast<unsigned>(cluster));
  config.programmatic(args.programmatic_launch);
  return cudaLaunchKernelEx(config.get(), stream_weights<Shape>, args, grid);
}

struct TableEntry {
  StreamPlan plan;  // but for the cluster
  bool fp32;
  cudaError_t (*launch)(const WeightStream&, int, cudaStream_t);
};

template <int kGroups, int kTiles, int kWarpsN, int kWarpsK, bool kFp32>
constexpr TableEntry entry() {
  return {{kGroups, kTiles, kWarpsN, kWarpsK, 0},
          kFp32,
          launch_shape<StreamShape<kGroups, kTiles, kWarpsN, kWarpsK, kFp32>>};
}

constexpr TableEntry kTable[] = {
    entry<1, 2, 1, 4, false>(), entry<1, 4, 1, 4, false>(), entry<2, 2, 1, 4, false>(),
    entry<2, 4, 1, 4, false>(), entry<4, 2, 1, 4, false>(), entry<4, 4, 1, 4, false>(),
    entry<4, 4, 2, 2, false>(), entry<8, 2, 1, 4, false>(), entry<8, 4, 1, 4, false>(),
    entry<8, 4, 2, 2, false>(), entry<1, 1, 1, 4, true>(),  entry<2, 1, 1, 4, true>(),
    entry<4, 1, 1, 4, true>(),  entry<8, 1, 1, 4, true>(),
};

}  // namespace

bool fits_stream(const void* x, std::int64_t x_stride, const void* weight, std::int64_t k) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return k > 0 && k % 8 == 0 && x_stride % 8 == 0 && aligned(x) && aligned(weight);
}

StreamPlan plan_stream(const WeightStream& args, int num_sms) {
  const bool experts = args.units != nullptr || args.direct_ids != nullptr;
  const std::int64_t rows = experts ? args.rows_per_unit : args.m;
  StreamPlan plan{};
  plan.groups = rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
  // In batch-invariant mode what follows may not depend on the number of rows.
  const std::int64_t units = args.batch_invariant ? 1
                             : experts            ? std::max<std::int64_t>(args.likely_units, 1)
                                                  : divide_up(args.m, 8 * plan.groups);
  const auto ctas = [&](int width, int cluster) { return divide_up(args.n, width) * cluster * units; };
  plan.tiles = 4;
  plan.warps_n = 1;
  plan.warps_k = 4;
  if (args.weight_fp32) {
    plan.tiles = 1;
  } else if (ctas(64, 8) < num_sms) {
    plan.tiles = 2;
  } else if (plan.groups >= 4 && !args.batch_invariant && ctas(128, 4) >= num_sms) {
    plan.warps_n = 2;  // half the traffic of x
    plan.warps_k = 2;
  }
  const int width = 16 * plan.tiles * plan.warps_n;
  // The busiest multiprocessor's CTAs, each with its overhead.
  double best = 0;
  for (const int cluster : {1, 2, 4, 8}) {
    const double blocks = static_cast<double>(divide_up(divide_up(args.k, 64), cluster));
    const double bytes = blocks * 64 * width * (args.weight_fp32 ? 4 : 2);
    const double cost = static_cast<double>(divide_up(ctas(width, cluster), num_sms)) *
                        (bytes + kCtaOverheadBytes * (cluster > 1 ? 1.25 : 1.0));
    if (cluster == 1 || cost < 0.95 * best) {
      best = cost;
      plan.cluster = cluster;
    }
  }
  return plan;
}

cudaError_t launch_stream(const WeightStream& args, const StreamPlan& plan, cudaStream_t stream) {
  for (const TableEntry& e : kTable) {
    if (e.plan.groups == plan.groups && e.plan.tiles == plan.tiles && e.plan.warps_n == plan.warps_n &&
        e.plan.warps_k == plan.warps_k && e.fp32 == args.weight_fp32) {
      return e.launch(args, plan.cluster, stream);
    }
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_stream(const WeightStream& args, cudaStream_t stream) {
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  return launch_stream(args, plan_stream(args, num_sms), stream);
}

}  // namespace flash_mla::model::cuda
