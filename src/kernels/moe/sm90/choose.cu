// The choice of experts from a router's logits.
//
// Tile:      one token for each warp, of 2, 8 or 16 experts a lane (choose.cuh).
// Threads:   4 warps, all alike.
// Memory:    scores and biased scores of every warp's token: 2, 8 or 16 KB.
// Registers: 32, 37 or 74 a thread.

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/launch.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/moe/choose_call.h"
#include "kernels/moe/sm90/choose.cuh"
#include "kernels/moe/sm90/moe.h"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kWarps = 4;

template <int kPerLane>
__global__ __launch_bounds__(32 * kWarps) void choose(const RouteArgs p) {
  __shared__ float shared[kWarps][2][32 * kPerLane];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int warp = threadIdx.x / 32;
  const std::int64_t token = std::int64_t(blockIdx.x) * kWarps + warp;
  if (token < p.tokens) choice::choose_token<kPerLane>(p, token, shared[warp][0], shared[warp][1]);
}

}  // namespace

cudaError_t choose_experts(const RouteArgs& p, cudaStream_t stream) {
  if (!choice::valid(p)) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  LaunchConfig config(static_cast<unsigned>((p.tokens + kWarps - 1) / kWarps), 32 * kWarps, 0, stream);
  config.programmatic(p.programmatic_launch);
  if (p.routing.num_experts <= 64) return launch(config, choose<2>, p);
  if (p.routing.num_experts <= 256) return launch(config, choose<8>, p);
  return launch(config, choose<16>, p);
}

static_assert(kMaxGpuExperts == kMaxExperts && kMaxGpuExpertsPerToken == kMaxExpertsPerToken &&
              kMaxGpuGroups == choice::kMaxGroups);

void choose_experts(const ChooseCall& call, void* stream) {
  require_device(call.logits.device.index);
  const DeviceGuard guard(call.logits.device.index);
  RouteArgs args;
  args.logits = call.logits.ptr<float>();
  args.correction = call.bias.defined() ? call.bias.ptr<const float>() : nullptr;
  args.ids = call.ids.ptr<std::int32_t>();
  args.weights = call.weights.ptr<float>();
  args.tokens = call.logits.size(0);
  args.routing = call.routing;
  check(choose_experts(args, static_cast<cudaStream_t>(stream)), "choose_experts");
}

}  // namespace flash_mla::sm90
