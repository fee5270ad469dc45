// Attention of any head dimensions, correct and slow.
//
// Tile:      one query and head for each block; keys 128 at a time with an online softmax.
// Threads:   128: thread i scores key i of a tile, then all add up columns of the values.
// Memory:    the sums of the output's columns, and 1 KB for the weights of a tile and its maximum.
// Registers: 32 to 40 a thread.

#include <cuda_bf16.h>

#include <cmath>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/page_size.h"
#include "kernels/attention/plain/sm90/plain_attention.h"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90 {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 128;  // and keys of a tile

__device__ float dot(const bf16* a, const bf16* b, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum = fmaf(__bfloat162float(a[i]), __bfloat162float(b[i]), sum);
  return sum;
}

__device__ float block_max(float x, float* scratch) {
  scratch[threadIdx.x] = x;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) x = fmaxf(x, scratch[i]);
  __syncthreads();
  return x;
}

/// Online softmax over tiles of kThreads keys: thread i scores key i of the tile, then every thread adds up
/// columns i, i + kThreads, ... of the values. `score(j)` and `value(j)` (a row) of key j. Shared memory:
/// `columns` floats.
template <class Score, class Value>
__device__ void attend(int num_keys, int columns, const Score& score, const Value& value, bf16* out) {
  extern __shared__ float sums[];
  __shared__ float weights[kThreads], scratch[kThreads];
  for (int c = threadIdx.x; c < columns; c += kThreads) sums[c] = 0;
  float highest = -INFINITY, total = 0;
  for (int tile = 0; tile < num_keys; tile += kThreads) {
    const int key = tile + static_cast<int>(threadIdx.x), count = min(kThreads, num_keys - tile);
    const float s = key < num_keys ? score(key) : -INFINITY;
    const float next = fmaxf(highest, block_max(s, scratch));
    const float shrink = highest == -INFINITY ? 0.0f : expf(highest - next);
    weights[threadIdx.x] = key < num_keys ? expf(s - next) : 0.0f;
    __syncthreads();
    total *= shrink;
    for (int j = 0; j < count; ++j) total += weights[j];
    for (int c = threadIdx.x; c < columns; c += kThreads) {
      float sum = sums[c] * shrink;
      for (int j = 0; j < count; ++j) sum = fmaf(weights[j], __bfloat162float(value(tile + j)[c]), sum);
      sums[c] = sum;
    }
    highest = next;
    __syncthreads();
  }
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    out[c] = __float2bfloat16(num_keys > 0 ? sums[c] / total : 0.0f);
  }
}

const bf16* elements(const std::byte* p) { return reinterpret_cast<const bf16*>(p); }
bf16* elements(std::byte* p) { return reinterpret_cast<bf16*>(p); }

__global__ void __launch_bounds__(kThreads)
    plain_decode_kernel(PlainDecode p, const bf16* q, const bf16* cache, bf16* out) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t t = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y), width = p.rank + p.rope;
  const std::int32_t* pages = p.table + t * p.max_blocks;
  const bf16* query = q + t * p.q.stride + head * width;
  const auto key = [&](int j) {
    return cache + (static_cast<std::int64_t>(pages[j / kPageSize]) * kPageSize + j % kPageSize) * width;
  };
  attend(
      p.lens[t], p.rank, [&](int j) { return dot(query, key(j), width) * p.scale; }, key,
      out + t * p.out.stride + head * p.rank);
}

__global__ void __launch_bounds__(kThreads)
    plain_prefill_kernel(PlainPrefill p, const bf16* q, const bf16* expanded, const bf16* k_rope, bf16* out) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int t = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  int seq = 0;
  while (t >= p.query_starts[seq + 1]) ++seq;
  const std::int64_t first = p.key_starts[seq];
  const int num_queries = p.query_starts[seq + 1] - p.query_starts[seq];
  const int num_keys = p.key_starts[seq + 1] - p.key_starts[seq];
  const bf16* query = q + t * p.q.stride + head * (p.nope + p.rope);
  const auto row = [&](int j) { return expanded + ((first + j) * p.heads + head) * (p.nope + p.v); };
  attend(
      num_keys - num_queries + (t - p.query_starts[seq]) + 1, p.v,
      [&](int j) {
        return (dot(query, row(j), p.nope) + dot(query + p.nope, k_rope + (first + j) * p.rope, p.rope)) *
               p.scale;
      },
      [&](int j) { return row(j) + p.nope; }, out + t * p.out.stride + head * p.v);
}

}  // namespace

void plain_decode(const PlainDecode& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.q.rows), static_cast<unsigned>(a.heads));
  check(launch(LaunchConfig(grid, kThreads, static_cast<std::size_t>(a.rank) * sizeof(float), stream)
                   .programmatic(),
               plain_decode_kernel, a, elements(a.q.data), elements(a.cache), elements(a.out.data)),
        "plain_decode");
}

void plain_prefill(const PlainPrefill& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.q.rows), static_cast<unsigned>(a.heads));
  check(
      launch(
          LaunchConfig(grid, kThreads, static_cast<std::size_t>(a.v) * sizeof(float), stream).programmatic(),
          plain_prefill_kernel, a, elements(a.q.data), elements(a.expanded), elements(a.k_rope),
          elements(a.out.data)),
      "plain_prefill");
}

}  // namespace flash_mla::sm90
