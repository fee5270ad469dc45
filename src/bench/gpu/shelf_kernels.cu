#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "base/cuda/check.h"
#include "bench/gpu/shelf_kernels.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class Combine>
__device__ float over_block(float x, float* shared, Combine combine) {
  for (int i = 16; i > 0; i /= 2) x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < kWarps; ++i) x = combine(x, shared[i]);
  return x;
}

// A block per row: scores by a warp per key, then the softmax, then the sum over values by a thread per column.
__global__ void __launch_bounds__(kThreads)
    reference_kernel(const OwnKeysProblem p, const OutputRow* rows, float* all_scores, float* out) {
  using Bf16 = __nv_bfloat16;
  const OutputRow row = rows[blockIdx.x];
  const int kv_head = row.head / (p.h_q / p.h_kv);
  const int visible = p.causal ? p.s_k - p.s_q + row.query + 1 : p.s_k;
  const std::int32_t* slots = p.slots + std::int64_t{row.request} * p.s_k;
  const Bf16* q = static_cast<const Bf16*>(p.q) +
                  ((std::int64_t{row.request} * p.s_q + row.query) * p.h_q + row.head) * (p.d_k + p.d_rope);
  float* scores = all_scores + std::int64_t{blockIdx.x} * p.s_k;
  __shared__ float shared[kWarps];

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float highest = -INFINITY;
  for (int j = warp; j < visible; j += kWarps) {
    const Bf16* k = static_cast<const Bf16*>(p.k) + slots[j] * p.k_row + kv_head * p.k_head;
    float x = 0;
    for (int d = lane; d < p.d_k; d += 32) x += __bfloat162float(q[d]) * __bfloat162float(k[d]);
    if (p.d_rope > 0) {
      const Bf16* rope = static_cast<const Bf16*>(p.k_rope) + slots[j] * p.k_rope_row;
      for (int d = lane; d < p.d_rope; d += 32)
        x += __bfloat162float(q[p.d_k + d]) * __bfloat162float(rope[d]);
    }
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, i);
    x *= p.scale;
    if (lane == 0) scores[j] = x;
    highest = fmaxf(highest, x);
  }
  highest = over_block(highest, shared, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += kThreads) {
    scores[j] = expf(scores[j] - highest);
    sum += scores[j];
  }
  sum = over_block(sum, shared, [](float a, float b) { return a + b; });
  for (int d = static_cast<int>(threadIdx.x); d < p.d_v; d += kThreads) {
    float x = 0;
    for (int j = 0; j < visible; ++j) {
      x += scores[j] *
           __bfloat162float(static_cast<const Bf16*>(p.v)[slots[j] * p.v_row + kv_head * p.v_head + d]);
    }
    out[std::int64_t{blockIdx.x} * p.d_v + d] = x / sum;
  }
}

}  // namespace

void reference_own_keys(const OwnKeysProblem& problem, const OutputRow* rows, int count, float* scores,
                        float* out, cudaStream_t stream) {
  reference_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(problem, rows, scores, out);
  check(cudaGetLastError(), "reference_own_keys");
}

}  // namespace flash_mla::bench::gpu
