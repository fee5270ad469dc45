// A norm and the choice of experts of its result.
//
// Tile:      one token for a cluster of 8 CTAs. All normalise its row, the first writes it.
// Threads:   8 warps. Of the experts every CTA has an eighth, a warp's turn each; the router's rows of the
//            first turn are fetched before the kernel in front has finished. The first warp of the first CTA
//            chooses.
// Memory:    the normalised row as float32 (up to 8192 columns, 32 KB), scores and biased scores of the
//            experts.
// Registers: 115 (up to 64 experts) or 140 (up to 256) a thread, 64 of them a lane's early part of the
//            router.

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "kernels/moe/sm90/choose.cuh"
#include "kernels/moe/sm90/norm_route.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/rows/sm90/row_math.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kCluster = 8;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kMaxHidden = 8192;
constexpr std::int64_t kMaxRouterBytes = 1 << 20;
constexpr int kEarly = 16;  // float4 of a router's row that a lane fetches early: 2048 columns

struct Params {
  RouteArgs route;
  const bf16* in;
  std::int64_t in_stride;
  const float* norm;
  float eps;
};

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) norm_and_route_kernel(const Params p) {
  __shared__ alignas(16) float row[kMaxHidden];  // normalised and rounded
  __shared__ float scores[32 * kPerLane], choices[32 * kPerLane];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t token = blockIdx.x / kCluster;
  const int rank = static_cast<int>(blockIdx.x % kCluster);
  const int hidden = static_cast<int>(p.route.hidden), experts = p.route.routing.num_experts;
  const auto weights = [&](int e) {
    return reinterpret_cast<const float4*>(p.route.router + static_cast<std::int64_t>(e) * hidden);
  };

  const int first = rank * kWarps + warp;
  float4 early[kEarly];
#pragma unroll
  for (int i = 0; i < kEarly; ++i) {
    const int at = i * kWarp + lane;
    early[i] = first < experts && at < hidden / 4 ? __ldg(weights(first) + at) : make_float4(0, 0, 0, 0);
  }
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();

  const bf16* in = p.in + token * p.in_stride;
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden; i += kThreads * 8) {
    const Vector<8> v = load<8>(in + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      row[i + j] = __bfloat162float(v.v[j]);
      squares += row[i + j] * row[i + j];
    }
  }
  const float factor = rsqrtf(block_sum(squares) / static_cast<float>(hidden) + p.eps);
  bf16* out = static_cast<bf16*>(const_cast<void*>(p.route.x)) + token * p.route.x_stride;
  for (int i = static_cast<int>(threadIdx.x) * 8; i < hidden; i += kThreads * 8) {
    Vector<8> v;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v.v[j] = __float2bfloat16(row[i + j] * factor * p.norm[i + j]);
      row[i + j] = __bfloat162float(v.v[j]);
    }
    if (rank == 0) store<8>(out + i, v);
  }
  __syncthreads();

  const auto multiply = [&](const float4& w, int at) {
    const float4 x = reinterpret_cast<const float4*>(row)[at];
    return w.x * x.x + w.y * x.y + (w.z * x.z + w.w * x.w);
  };
  for (int e = first; e < experts; e += kCluster * kWarps) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      const int at = i * kWarp + lane;
      if (at < hidden / 4) sum += multiply(e == first ? early[i] : __ldg(weights(e) + at), at);
    }
    for (int at = kEarly * kWarp + lane; at < hidden / 4; at += kWarp) {
      sum += multiply(__ldg(weights(e) + at), at);
    }
    sum = warp_sum(sum);
    if (lane == 0) p.route.logits[token * experts + e] = sum;
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (rank == 0 && warp == 0) choice::choose_token<kPerLane>(p.route, token, scores, choices);
}

}  // namespace

bool fits_norm_and_route(const NormAndRoute& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const RouteArgs& r = a.route;
  return r.tokens <= 64 && !r.batch_invariant && r.hidden % 8 == 0 && r.hidden <= kMaxHidden &&
         r.routing.num_experts <= 256 && r.routing.num_experts * r.hidden * 4 <= kMaxRouterBytes &&
         aligned(a.in) && aligned(r.x) && aligned(r.router) && a.in_stride % 8 == 0 && r.x_stride % 8 == 0;
}

void norm_and_route(const NormAndRoute& a, cudaStream_t stream) {
  const Params p{a.route, static_cast<const bf16*>(a.in), a.in_stride, a.norm, a.eps};
  LaunchConfig config(static_cast<unsigned>(a.route.tokens * kCluster), kThreads, 0, stream);
  config.cluster(kCluster).programmatic();
  const auto kernel = a.route.routing.num_experts <= 64 ? norm_and_route_kernel<2> : norm_and_route_kernel<8>;
  check(launch(config, kernel, p), "norm_and_route");
}

}  // namespace flash_mla::sm90
