#pragma once

// The prefill kernel for keys and values of their own: gqa_attention with many queries.
//
// Item       128 query rows of one head x all keys that they see, in tiles of 128 keys, 64 if values have more than 128
//            columns. CTAs are persistent, one per SM, and take items from a list in order (work.cuh).
// Threads    384, as in kernel.cuh; all lanes of the producer warp issue copies where pages are smaller than a tile
//            (grouped_producer.cuh).
// Shared     Q | 2 to 4 slots of K | as many of V | two items | barriers. d 64: 16 + 4 x 32 KB; 128: 32 + 3 x 64;
//            192/128: 48 + 2 x 80; 256: 64 + 2 x 64.
// Registers  consumers 224 (S, P and O as in kernel.cuh; with 256 columns O 128, S 32, P 16), producer 56.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/consumer.cuh"
#include "kernels/attention/dense_prefill/sm90/grouped_producer.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::prefill {

extern __shared__ std::byte grouped_smem[];

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

}  // namespace flash_mla::sm90::prefill
