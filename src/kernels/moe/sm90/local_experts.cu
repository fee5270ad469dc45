// Which choices of experts are a rank's own.
//
// Tile:      one choice for each thread.
// Registers: 16 a thread.

#include "base/cuda/launch.h"
#include "kernels/moe/sm90/local_experts.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) local_experts_kernel(const LocalExperts p) {
  const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.tokens * p.experts_per_token) return;
  const ExpertPlace place = p.places[p.ids[i]];
  const std::int64_t turn = p.by_turn ? i / p.experts_per_token % place.replicas : 0;
  p.out[i] = place.index >= 0 && turn == place.turn ? place.index : -1;
}

}  // namespace

cudaError_t local_experts(const LocalExperts& args, cudaStream_t stream) {
  const std::int64_t choices = args.tokens * args.experts_per_token;
  LaunchConfig config(dim3(static_cast<unsigned>((choices + kThreads - 1) / kThreads)), kThreads, 0, stream);
  return launch(config, local_experts_kernel, args);
}

}  // namespace flash_mla::sm90
