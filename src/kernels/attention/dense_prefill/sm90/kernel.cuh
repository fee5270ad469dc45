#pragma once

// The prefill kernel.
//
// Item       128 query rows of one head x all keys that they see, in tiles of 128 keys. CTAs are persistent,
//            one per SM, and take items from a list in order (work.cuh).
// Threads    384. Warps 0-3 and 4-7: consumer warpgroups of 64 rows each (consumer.cuh); warp 8: the
//            producer, whose lane 0 issues all copies (producer.cuh); warps 9-11 only give their registers
//            away.
// Shared     Q 48 KB | two slots of K, 48 KB each: 2 chunks of 64 columns nope, 1 rope | two slots of V,
//            32 KB each | two items | barriers: 208 KB. Tiles as ptx/tile.cuh has them, 128 rows a chunk.
// Registers  consumers 232 (O 64, S 64, P 32, a third of Q 16), producer 40, through setmaxnreg.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/consumer.cuh"
#include "kernels/attention/dense_prefill/sm90/producer.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::prefill {

template <bool kBf16>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_nope_map,
                   const __grid_constant__ CUtensorMap k_rope_map, const __grid_constant__ CUtensorMap v_map,
                   const __grid_constant__ Params p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s = *reinterpret_cast<Smem<LatentHeads, ptx::Element<kBf16>>*>(
      (reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerWarps && threadIdx.x % 32 == 0) {
    for (const CUtensorMap* map : {&q_map, &k_nope_map, &k_rope_map, &v_map}) ptx::prefetch_tensor_map(map);
    init_barriers(s);
  }
  __syncthreads();
  if (warp >= kConsumerWarps) {
    ptx::set_max_registers_down<40>();
    if (warp == kConsumerWarps) Producer(p, s, Maps{&q_map, &k_nope_map, &k_rope_map, &v_map}).run();
  } else {
    ptx::set_max_registers_up<232>();
    Consumer<LatentHeads, kBf16>(p, s).run();
  }
}

}  // namespace flash_mla::sm90::prefill
