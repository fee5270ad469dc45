#pragma once

// Token-sparse MLA decode over an FP8 cache, 64 query rows (heads of one query token) per CTA.
//
// Tile       64 rows x 64 keys of the token's lists x 576 (V4: 512); O is 64 x 512 fp32 in registers.
// Threads    512: two consumer warpgroups (WG0, WG1) and two of producers, whose eight warps gather and widen keys.
// Shared     Q 72 KB | two key tiles as bf16, slot 0 and slot 1, 72 KB each | row statistics 1.5 KB | barriers. Made
//            of 64-column chunks (8 KB, 128-byte swizzle). P takes a slot's last chunk, over the rope part where that
//            is not part of V.
// Registers  128 at the start, then consumers 200 (O half 128, S 32, P 16), producers 56 (loads on their way 28),
//            through setmaxnreg. 128 at the start do not hold the accumulators of m64n256k16: O's halves are two of
//            m64n128k16 each.
//
// The 128 heads of a token are two CTAs; each widens all keys.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/sparse_decode/sm90/consumer.cuh"
#include "kernels/attention/sparse_decode/sm90/producer.cuh"
#include "kernels/attention/sparse_decode/sm90/smem.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::sparse {

template <KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1)
    sparse_decode_kernel(const __grid_constant__ CUtensorMap q_map,
                         const __grid_constant__ SparseDecodeParams p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s = *reinterpret_cast<Smem*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == kConsumerThreads) {
    ptx::prefetch_tensor_map(&q_map);
    ptx::mbarrier_init(&s.q_full, 1);
    ptx::mbarrier_init(&s.q_empty, 8);
    for (int slot = 0; slot < 2; ++slot) {
      for (auto& barrier : s.kv_full[slot]) ptx::mbarrier_init(&barrier, kProducerWarps);
      for (auto& barrier : s.kv_empty[slot]) ptx::mbarrier_init(&barrier, 4);
    }
    ptx::fence_barrier_init();
  }
  ptx::grid_dependency_wait();
  const PartRange part = part_of(p, static_cast<int>(blockIdx.z));
  __syncthreads();
  ptx::grid_dependency_launch();
  if (part.begin_req >= p.batch) return;
  if (warp >= kConsumerThreads / 32) {
    ptx::set_max_registers_down<56>();
    Producer<kFormat>{p,
                      s,
                      &q_map,
                      part,
                      warp - kConsumerThreads / 32,
                      static_cast<int>(threadIdx.x) % 32,
                      token_of_block(p)}
        .run();
  } else if (warp < 4) {
    ptx::set_max_registers_up<200>();
    Consumer<kFormat, 0>(p, s).run(part);
  } else {
    ptx::set_max_registers_up<200>();
    Consumer<kFormat, 1>(p, s).run(part);
  }
}

}  // namespace flash_mla::sm90::sparse
