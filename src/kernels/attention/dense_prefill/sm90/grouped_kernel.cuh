#pragma once

// The prefill kernel for keys and values of their own: gqa_attention with many queries.
//
// Item       128 query rows of one head x all keys that they see, in tiles of 128 keys, 64 if values have more than 128
//            columns. CTAs are persistent, one per SM, and take items from a list in order (work.cuh).
// Threads    384, as in kernel.cuh; all lanes of the producer warp issue copies where pages are smaller than a tile
//            (grouped_producer.cuh).
// Shared     Q | 2 to 4 slots of K | as many of V | two items | barriers. d 64: 16 + 4 x 32 KB; 128: 32 + 3 x 64;
//            192/128: 48 + 2 x 80; 256: 64 + 2 x 64.
// Splits     where items are fewer than multiprocessors, each is several, of a part of its tiles of keys each; a second kernel
//            puts their results together.
// Registers  consumers 224 (S, P and O as in kernel.cuh; with 256 columns O 128, S 32, P 16), producer 56.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/consumer.cuh"
#include "kernels/attention/dense_prefill/sm90/grouped_producer.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::prefill {

extern __shared__ std::byte grouped_smem[];

inline constexpr int kCombineThreads = 128;

/// Of a query, counted over all sequences: whether it sees a key, and whether it is one of a sequence's at all.
struct QueryOfBatch {
  bool is_one, sees;
};
__device__ inline QueryOfBatch query_of_batch(const GroupedParams& p, std::int64_t token) {
  const flash_mla::gqa::Problem& problem = p.problem;
  int low = 0, high = problem.batch - 1;  // the last sequence that begins at or before it, and is not empty
  if (problem.cu_q == nullptr) {
    low = static_cast<int>(token / problem.uniform_q);
  } else {
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (problem.cu_q[middle] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
  }
  const std::int64_t query = token - problem.first_query(low);
  const flash_mla::gqa::Range seen = problem.visible(query, problem.queries(low), problem.keys(low));
  const bool is_one = query >= 0 && problem.queries(low) > query;
  return {is_one, seen.end > seen.begin};
}

/// C: GroupedHeads.
template <class C, bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_prefill_kernel(const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap v_map,
                           const __grid_constant__ GroupedParams p) {
  auto& s = *reinterpret_cast<Smem<C, ptx::Element<kBf16>>*>(
      (reinterpret_cast<std::uintptr_t>(grouped_smem) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerWarps && threadIdx.x % 32 == 0) {
    for (const CUtensorMap* map : {&q_map, &k_map, &v_map}) ptx::prefetch_tensor_map(map);
    init_barriers(s);
  }
  __syncthreads();
  if (warp >= kConsumerWarps) {
    ptx::set_max_registers_down<56>();
    if (warp == kConsumerWarps)
      GroupedProducer<C, ptx::Element<kBf16>>(p, s, GroupedMaps{&q_map, &k_map, &v_map}).run();
  } else {
    ptx::set_max_registers_up<224>();
    Consumer<C, kBf16>(p, s).run();
  }
}

/// Puts the parts of split items together: a warp for each query and head, in turn.
template <class C, bool kBf16>
__global__ void __launch_bounds__(kCombineThreads) grouped_combine(const __grid_constant__ GroupedParams p) {
  using flash_mla::gqa::Problem;
  const Problem& problem = p.problem;
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = kCombineThreads / 32;
  const std::int64_t rows = p.total_q * problem.h_q;
  for (std::int64_t row = std::int64_t{blockIdx.x} * warps + threadIdx.x / 32; row < rows;
       row += std::int64_t{gridDim.x} * warps) {
    const std::int64_t token = row / problem.h_q, head = row - token * problem.h_q;
    const QueryOfBatch query = query_of_batch(p, token);
    if (!query.is_one) continue;
    // A lane looks after one part, of 32 at most.
    const float own = lane < p.splits ? p.partial_lse[lane * rows + row] : -INFINITY;
    float best = own;
    for (int i = 1; i < 32; i *= 2) {
      const float x = __shfl_xor_sync(0xFFFFFFFFu, best, i);
      best = x > best || x != x ? x : best;
    }
    // Parts without weight have left nothing to read: the best one is read instead, whose values are finite or nobody's are.
    const float own_weight = own == -INFINITY ? 0.0f : exp2f(own - best);
    const int some = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFu, own != -INFINITY))) - 1;
    float total = 0.0f;
    constexpr int kPairs = C::kHeadDimV / 64;  // of a lane's columns
    float2 sum[kPairs] = {};
    for (int s = 0; s < p.splits && some >= 0; ++s) {
      const float weight = __shfl_sync(0xFFFFFFFFu, own_weight, s);
      const bool has = __shfl_sync(0xFFFFFFFFu, own, s) != -INFINITY;
      const float* const from = p.partial_out + ((has ? s : some) * rows + row) * C::kHeadDimV + 2 * lane;
      total += weight;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 part = *reinterpret_cast<const float2*>(from + 64 * i);
        sum[i].x += weight * part.x;
        sum[i].y += weight * part.y;
      }
    }
    const float lse = total == 0.0f ? -INFINITY : best + log2f(total);
    float factor = 1.0f / total;
    if (problem.sinks != nullptr && total != 0.0f)
      factor /= 1.0f + exp2f(problem.sinks[head] * 1.4426950408889634f - lse);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      // A row that sees keys, all with scores of -inf, has no average.
      const std::uint32_t word = query.sees ? pack2<kBf16>(sum[i].x * factor, sum[i].y * factor) : 0;
      *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(p.out) + token * p.out_stride_token +
                                        head * p.out_stride_head + 2 * lane + 64 * i) = word;
    }
    if (p.lse != nullptr && lane == 0) {
      const float natural = lse * 0.6931471805599453f;
      p.lse[head * p.lse_stride_head + token * p.lse_stride_token] = !query.sees     ? INFINITY
                                                                     : total == 0.0f ? NAN
                                                                                     : natural;
    }
  }
}

}  // namespace flash_mla::sm90::prefill
