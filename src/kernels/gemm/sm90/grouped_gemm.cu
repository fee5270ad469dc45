// Launches of grouped_gemm.cuh.

#include <algorithm>

#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/gemm/sm90/grouped_gemm.cuh"

namespace flash_mla::sm90 {
namespace {

template <StreamWeight kWeight>
cudaError_t launch_tiles(const WeightStream& args, const grouped::Grid& grid, int num_sms,
                         cudaStream_t stream) {
  if (const cudaError_t e = allow_shared_memory<grouped::grouped_gemm<kWeight>>(grouped::kSharedBytes))
    return e;
  const std::int64_t most = grid.column_tiles * args.max_units;
  LaunchConfig config(static_cast<unsigned>(std::min<std::int64_t>(most, num_sms)), grouped::kThreads,
                      grouped::kSharedBytes, stream);
  return launch(config.programmatic(args.programmatic_launch), grouped::grouped_gemm<kWeight>, args, grid);
}

}  // namespace

cudaError_t launch_grouped_gemm(const WeightStream& args, cudaStream_t stream) {
  if (args.units == nullptr || args.bias != nullptr || args.accumulate || args.weight_fp32 ||
      args.out_stride % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  int num_sms = 0;
  if (const cudaError_t e = multiprocessors(num_sms)) return e;
  grouped::Grid grid{};
  grid.width = args.silu_mul ? grouped::kColumns / 2 : grouped::kColumns;
  grid.column_tiles = ((args.silu_mul ? args.n / 2 : args.n) + grid.width - 1) / grid.width;
  if (args.weight_int4) return launch_tiles<StreamWeight::kInt4>(args, grid, num_sms, stream);
  return args.scales != nullptr ? launch_tiles<StreamWeight::kE4m3>(args, grid, num_sms, stream)
                                : launch_tiles<StreamWeight::kBf16>(args, grid, num_sms, stream);
}

}  // namespace flash_mla::sm90
