// Sum over ranks, residual and norm in one kernel over peers' memory.
//
// Tile:      one row for each CTA at a time, rows rank + size * (cta + i * ctas).
// Threads:   256, all alike; up to 8 vectors of 8 elements each.
// Memory:    a sum of each warp.
// Registers: up to 128 a thread: 64 hold the row's sums.
//
// A meeting of all ranks' CTAs of one number comes before the first row (the partial sums are there) and behind the last
// (all results are, and nobody reads the partial sums any more). Each CTA writes its count of meetings to the peers, for
// each of them a word of its own, and waits until theirs have come as far: so nothing has to be reset between calls, and
// a graph can be replayed.

#include <cuda_bf16.h>

#include <string>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/exchange/sm90/all_reduce_norm.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kVec = 8, kMaxVectors = 8;

/// Words of a CTA's flags: what each peer has come to, and its own count.
constexpr int kWords = 16;

struct alignas(16) Row8 {
  __nv_bfloat162 v[4];
};

__device__ void signal(std::uint32_t* flag, std::uint32_t count) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(count) : "memory");
}
__device__ std::uint32_t seen(const std::uint32_t* flag) {
  std::uint32_t count;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(count) : "l"(flag) : "memory");
  return count;
}

/// Waits for the CTAs of this number on all ranks. The barriers of the CTA carry what its other threads have written into
/// the release, and what the acquire has seen to them.
__device__ void meet(const AllReduceNorm& p, std::uint32_t count) {
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < p.size) {
    signal(p.flags[peer] + blockIdx.x * kWords + p.rank, count);
    const std::uint32_t* mine = p.flags[p.rank] + blockIdx.x * kWords + peer;
    // Counts wrap around.
    while (static_cast<std::int32_t>(seen(mine) - count) < 0) {
    }
  }
  __syncthreads();
}

__device__ float sum_of_block(float x, float* warps) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += warps[i];
  __syncthreads();
  return sum;
}

template <int kVectors>
__device__ void reduce_row(const AllReduceNorm& p, std::int64_t row, float* warps) {
  const std::int64_t begin = row * p.hidden;
  const int vectors = static_cast<int>(p.hidden / kVec);
  float sums[kVectors][kVec];
  float squares = 0;
  Row8 rounded[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    for (int k = 0; k < kVec; ++k) sums[i][k] = 0;
    for (int peer = 0; peer < p.size; ++peer) {
      // Not through the first-level cache, which may have what a peer has written over since.
      const int4 raw = __ldcg(
          reinterpret_cast<const int4*>(static_cast<const __nv_bfloat16*>(p.partial[peer]) + begin) + at);
      const Row8 part = reinterpret_cast<const Row8&>(raw);
      for (int k = 0; k < 4; ++k) {
        const float2 two = __bfloat1622float2(part.v[k]);
        sums[i][2 * k] += two.x;
        sums[i][2 * k + 1] += two.y;
      }
    }
    const int4 raw =
        __ldcg(reinterpret_cast<const int4*>(static_cast<const __nv_bfloat16*>(p.x[p.rank]) + begin) + at);
    const Row8 before = reinterpret_cast<const Row8&>(raw);
    for (int k = 0; k < 4; ++k) {
      const float2 two = __bfloat1622float2(before.v[k]);
      rounded[i].v[k] = __floats2bfloat162_rn(two.x + sums[i][2 * k], two.y + sums[i][2 * k + 1]);
      // The norm is of x as it is stored.
      const float2 stored = __bfloat1622float2(rounded[i].v[k]);
      squares += stored.x * stored.x + stored.y * stored.y;
    }
  }
  const float factor = rsqrtf(sum_of_block(squares, warps) / static_cast<float>(p.hidden) + p.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    Row8 normed;
    for (int k = 0; k < 4; ++k) {
      const float2 x = __bfloat1622float2(rounded[i].v[k]);
      const float2 w = reinterpret_cast<const float2*>(p.weight)[at * 4 + k];
      normed.v[k] = __floats2bfloat162_rn(x.x * factor * w.x, x.y * factor * w.y);
    }
    for (int peer = 0; peer < p.size; ++peer) {
      reinterpret_cast<Row8*>(static_cast<__nv_bfloat16*>(p.x[peer]) + begin)[at] = rounded[i];
      reinterpret_cast<Row8*>(static_cast<__nv_bfloat16*>(p.normed[peer]) + begin)[at] = normed;
    }
  }
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads, 2) all_reduce_norm_kernel(AllReduceNorm p) {
  __shared__ float warps[kWarps];
  std::uint32_t* const own = p.flags[p.rank] + blockIdx.x * kWords + kMaxPeers;
  std::uint32_t count = *own;
  for (int i = 0; i < p.repeats; ++i) {
    meet(p, ++count);
    for (std::int64_t row = p.rank + static_cast<std::int64_t>(p.size) * blockIdx.x; row < p.rows;
         row += static_cast<std::int64_t>(p.size) * gridDim.x) {
      reduce_row<kVectors>(p, row, warps);
    }
    meet(p, ++count);
  }
  if (threadIdx.x == 0) *own = count;
}

void require(bool good, const char* name, std::int64_t value, const std::string& expected) {
  if (!good)
    throw InvalidArgument(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
}

}  // namespace

std::size_t all_reduce_norm_flags(int ctas) {
  return static_cast<std::size_t>(ctas) * kWords * sizeof(std::uint32_t);
}

void all_reduce_norm(const AllReduceNorm& args, cudaStream_t stream) {
  require(args.size >= 1 && args.size <= kMaxPeers, "size", args.size, "1 to 8");
  require(args.rank >= 0 && args.rank < args.size, "rank", args.rank, "0 to size - 1");
  require(args.rows >= 0, "rows", args.rows, ">= 0");
  require(args.hidden > 0 && args.hidden % kVec == 0 && args.hidden <= kThreads * kVec * kMaxVectors,
          "hidden", args.hidden, "a multiple of 8, at most 16384");
  require(args.ctas > 0, "ctas", args.ctas, "> 0");
  require(args.repeats > 0, "repeats", args.repeats, "> 0");
  const std::int64_t vectors = (args.hidden / kVec + kThreads - 1) / kThreads;
  const auto kernel = vectors <= 2   ? all_reduce_norm_kernel<2>
                      : vectors <= 4 ? all_reduce_norm_kernel<4>
                                     : all_reduce_norm_kernel<kMaxVectors>;
  check(launch(LaunchConfig(dim3(static_cast<unsigned>(args.ctas)), kThreads, 0, stream), kernel, args),
        "all_reduce_norm");
}

}  // namespace flash_mla::sm90
