#pragma once

// Token-sparse MLA prefill, 64 query rows (heads of one query token) per CTA; docs/kernels/sparse-prefill-sm90.md.
//
// Item       a query token and 64 of its heads x all keys of the token's list, in tiles of 64. CTAs are persistent, one
//            per SM, and take every n-th item, so that those of a token's heads run side by side.
// Tile       64 rows x 64 keys x 576 (or 512); O is 64 x 512 fp32 in registers.
// Threads    384: two consumer warpgroups (WG0, WG1; consumer.cuh) and four producer warps, each of which brings 16 of a
//            tile's keys (producer.cuh); they also bring Q and copy O out.
// Shared     Q 72 KB | two key tiles, slot 0 and slot 1, 72 KB each | row statistics 2.5 KB | barriers. Made of 64-column
//            chunks (8 KB, 128-byte swizzle); chunks 0-3, 4-7 and 8 of a slot have a "full" barrier each. P takes a
//            slot's ninth chunk, over the rope part where that is not part of V; a finished O leaves through slot 1.
// Registers  consumers 232 (O half 128, S 32, P 16, a chunk of Q 16), producers 40, through setmaxnreg.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/sparse_prefill/sm90/consumer.cuh"
#include "kernels/attention/sparse_prefill/sm90/producer.cuh"
#include "kernels/attention/sparse_prefill/sm90/smem.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::sparse_prefill {

template <bool kBf16, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_prefill_kernel(const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap out_map,
                          const __grid_constant__ SparsePrefillParams p) {
  extern __shared__ std::byte dynamic_smem[];
  using T = ptx::Element<kBf16>;
  using Rule = Gather;
  // 384 threads start with 168 each: 504 for a thread of each of the three warpgroups.
  constexpr int kProducers = Rule::kRegisters, kConsumers = (504 - kProducers) / 2;
  auto& s =
      *reinterpret_cast<Smem<T>*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  const unsigned warp = threadIdx.x / 32;
  if (threadIdx.x == kConsumerThreads) {
    ptx::prefetch_tensor_map(&q_map);
    ptx::prefetch_tensor_map(&out_map);
    ptx::mbarrier_init(&s.q_full, 1);
    ptx::mbarrier_init(&s.q_empty, 8);
    for (int slot = 0; slot < 2; ++slot) {
      ptx::mbarrier_init(&s.out_full[slot], 4);
      for (int part = 0; part < 3; ++part) {
        // The first part's says that the tile's `valid` is there, too.
        ptx::mbarrier_init(&s.kv_full[slot][part], Rule::arrivals(part) + (part == 0 ? kTileKeys / 4 : 0));
      }
      for (auto& barrier : s.kv_empty[slot]) ptx::mbarrier_init(&barrier, 4);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warp >= kConsumerThreads / 32) {
    ptx::set_max_registers_down<kProducers>();
    Producer<kBf16, kHeadDim>(p, s, &q_map, &out_map, warp - kConsumerThreads / 32, threadIdx.x % 32).run();
  } else if (warp < 4) {
    ptx::set_max_registers_up<kConsumers>();
    Consumer<kBf16, kHeadDim, 0>(p, s).run();
  } else {
    ptx::set_max_registers_up<kConsumers>();
    Consumer<kBf16, kHeadDim, 1>(p, s).run();
  }
}

}  // namespace flash_mla::sm90::sparse_prefill
