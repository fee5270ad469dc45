// Sum over ranks, residual and norm in one kernel over peers' memory.
//
// Tile:      one row for each CTA at a time, rows rank + size * (cta + i * ctas).
// Threads:   256, all alike; up to 8 vectors of 8 elements each.
// Memory:    a sum of each warp.
// Registers: up to 128 a thread: 64 hold the row's sums.
//
// A meeting of all ranks' CTAs of one number (meeting.cuh) comes before the first row (the partial sums are there) and
// behind the last (all results are, and nobody reads the partial sums any more).

#include <cuda_bf16.h>

#include <string>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/exchange/sm90/all_reduce_norm.h"
#include "kernels/exchange/sm90/meeting.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kVec = 8, kMaxVectors = 8;

struct alignas(16) Row8 {
  __nv_bfloat162 v[4];
};

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
    for (int peer = 0; peer < p.peers.size; ++peer) {
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
    const int4 raw = __ldcg(
        reinterpret_cast<const int4*>(static_cast<const __nv_bfloat16*>(p.x[p.peers.rank]) + begin) + at);
    const Row8 before = reinterpret_cast<const Row8&>(raw);
    for (int k = 0; k < 4; ++k) {
      const float2 two = __bfloat1622float2(before.v[k]);
      rounded[i].v[k] = __floats2bfloat162_rn(two.x + sums[i][2 * k], two.y + sums[i][2 * k + 1]);
      // The norm is of x as it is stored.
      const float2 stored = __bfloat1622float2(rounded[i].v[k]);
      squares += stored.x * stored.x + stored.y * stored.y;
    }
  }
  const bool norm = p.weight != nullptr;
  const float factor =
      !norm ? 0 : rsqrtf(sum_of_block(squares, warps) / static_cast<float>(p.hidden) + p.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= vectors) continue;
    Row8 normed{};
    for (int k = 0; norm && k < 4; ++k) {
      const float2 x = __bfloat1622float2(rounded[i].v[k]);
      const float2 w = reinterpret_cast<const float2*>(p.weight)[at * 4 + k];
      normed.v[k] = __floats2bfloat162_rn(x.x * factor * w.x, x.y * factor * w.y);
    }
    for (int peer = 0; peer < p.peers.size; ++peer) {
      reinterpret_cast<Row8*>(static_cast<__nv_bfloat16*>(p.x[peer]) + begin)[at] = rounded[i];
      if (norm) reinterpret_cast<Row8*>(static_cast<__nv_bfloat16*>(p.normed[peer]) + begin)[at] = normed;
    }
  }
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    all_reduce_norm_kernel(const __grid_constant__ AllReduceNorm p) {
  __shared__ float warps[kWarps];
  Meeting meeting(p.peers);
  for (int i = 0; i < p.repeats; ++i) {
    if (!meeting.meet()) return;
    for (std::int64_t row = p.peers.rank + static_cast<std::int64_t>(p.peers.size) * blockIdx.x; row < p.rows;
         row += static_cast<std::int64_t>(p.peers.size) * gridDim.x) {
      reduce_row<kVectors>(p, row, warps);
    }
    if (!meeting.meet()) return;
  }
  meeting.end();
}

void require(bool good, const char* name, std::int64_t value, const std::string& expected) {
  if (!good)
    throw InvalidArgument(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
}

}  // namespace

std::size_t peer_flags(int ctas) {
  return static_cast<std::size_t>(ctas) * kFlagWords * sizeof(std::uint32_t);
}

void all_reduce_norm(const AllReduceNorm& args, cudaStream_t stream) {
  require(args.peers.size >= 1 && args.peers.size <= kMaxPeers, "size", args.peers.size, "1 to 8");
  require(args.peers.rank >= 0 && args.peers.rank < args.peers.size, "rank", args.peers.rank,
          "0 to size - 1");
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
