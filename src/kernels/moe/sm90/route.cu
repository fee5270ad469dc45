// The choice of experts, behind the router's product (skinny_gemm.h).
//
// Tile:      one token for each warp, of 2, 8 or 16 experts a lane (choose.cuh).
// Threads:   4 warps, all alike.
// Memory:    scores and biased scores of every warp's token: 2, 8 or 16 KB.
// Registers: 32, 37 or 74 a thread.

#include <cstdint>

#include "base/cuda/launch.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/moe/sm90/choose.cuh"
#include "kernels/moe/sm90/moe.h"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90 {
namespace {

using choice::kMaxGroups;

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

bool valid(const RouteArgs& p) {
  const Routing& r = p.routing;
  const bool groups = r.method == TopkMethod::kGreedy ||
                      (r.num_groups >= 1 && r.num_groups <= kMaxGroups && r.num_experts % r.num_groups == 0 &&
                       r.groups_kept >= 1 && r.groups_kept <= r.num_groups);
  return p.tokens >= 0 && r.num_experts >= 1 && r.num_experts <= kMaxExperts && r.experts_per_token >= 1 &&
         r.experts_per_token <= r.num_experts && r.shared_experts >= 0 &&
         r.experts_per_token + r.shared_experts <= kMaxExpertsPerToken && groups &&
         (p.tokens == 0 || (p.logits != nullptr && p.ids != nullptr && p.weights != nullptr));
}

}  // namespace

cudaError_t choose_experts(const RouteArgs& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  LaunchConfig config(static_cast<unsigned>((p.tokens + kWarps - 1) / kWarps), 32 * kWarps, 0, stream);
  config.programmatic(p.programmatic_launch);
  if (p.routing.num_experts <= 64) return launch(config, choose<2>, p);
  if (p.routing.num_experts <= 256) return launch(config, choose<8>, p);
  return launch(config, choose<16>, p);
}

cudaError_t route(const RouteArgs& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  SkinnyGemm logits;
  logits.x = p.x;
  logits.x_stride = p.x_stride;
  logits.weight = p.router;
  logits.out = p.logits;
  logits.out_stride = p.routing.num_experts;
  logits.m = p.tokens;
  logits.n = p.routing.num_experts;
  logits.k = p.hidden;
  logits.out_fp32 = logits.weight_fp32 = true;
  logits.batch_invariant = p.batch_invariant;
  logits.programmatic_launch = p.programmatic_launch;
  if (const cudaError_t e = skinny_gemm(logits, stream)) return e;
  return choose_experts(p, stream);
}

}  // namespace flash_mla::sm90
