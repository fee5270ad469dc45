// Keys and queries of an indexer: LayerNorm and rotation, before they are quantised.
//
// Tile:      a key for each warp, 4 warps a block; of queries a pair for each thread.
// Threads:   lane l has a key's elements (dim / 32) l and its 1 or 3 neighbours, so that a pair is in one lane.
// Memory:    none that is shared; sums of a key are shuffles.
// Registers: up to 32.

#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "kernels/ptx/cluster.cuh"
#include "kernels/rows/sm90/index_rows.h"
#include "kernels/rows/sm90/row_math.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

struct KeyParams {
  bf16* k;
  std::int64_t stride, rows;
  const float* weight;
  const float* bias;
  float eps;
  IndexRotation rotation;
};

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) index_key_kernel(const KeyParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= p.rows) return;
  constexpr float kDim = kPerLane * kWarp;
  bf16* const row = p.k + t * p.stride + lane * kPerLane;
  Vector<kPerLane> values = load<kPerLane>(row);
  float x[kPerLane], sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = __bfloat162float(values.v[i]);
    sum += x[i];
  }
  const float mean = warp_sum(sum) / kDim;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / sqrtf(warp_sum(squares) / kDim + p.eps);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = lane * kPerLane + i;
    values.v[i] = __float2bfloat16((x[i] - mean) * factor * p.weight[column] + p.bias[column]);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; i += 2) {
    const int pair = (lane * kPerLane + i) / 2;
    if (pair >= p.rotation.pairs) continue;
    const std::int64_t at = t * p.rotation.pairs + pair;
    rotate(&values.v[i], &values.v[i], p.rotation.cosines[at], p.rotation.sines[at]);
  }
  store<kPerLane>(row, values);
}

__global__ void __launch_bounds__(kThreads)
    index_query_kernel(bf16* q, std::int64_t stride, int heads, int dim, const IndexRotation rotation) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.x;
  const float* const cosines = rotation.cosines + t * rotation.pairs;
  const float* const sines = rotation.sines + t * rotation.pairs;
  for (int i = static_cast<int>(threadIdx.x); i < heads * rotation.pairs; i += kThreads) {
    const int pair = i % rotation.pairs;
    bf16* const x = q + t * stride + static_cast<std::int64_t>(i / rotation.pairs) * dim + 2 * pair;
    rotate(x, x, cosines[pair], sines[pair]);
  }
}

}  // namespace

void norm_and_rotate_index_keys(Matrix k, const float* weight, const float* bias, float eps,
                                const IndexRotation& rotation, cudaStream_t stream) {
  const KeyParams p{reinterpret_cast<bf16*>(k.data), k.stride, k.rows, weight, bias, eps, rotation};
  const auto blocks = static_cast<unsigned>((k.rows + kWarps - 1) / kWarps);
  check(launch(LaunchConfig(blocks, kThreads, 0, stream).programmatic(),
               k.columns == 128 ? index_key_kernel<4> : index_key_kernel<2>, p),
        "norm_and_rotate_index_keys");
}

void rotate_index_queries(Matrix q, int dim, const IndexRotation& rotation, cudaStream_t stream) {
  check(launch(LaunchConfig(static_cast<unsigned>(q.rows), kThreads, 0, stream).programmatic(),
               index_query_kernel, reinterpret_cast<bf16*>(q.data), q.stride,
               static_cast<int>(q.columns / dim), dim, rotation),
        "rotate_index_queries");
}

}  // namespace flash_mla::sm90
