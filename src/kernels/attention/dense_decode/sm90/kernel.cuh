#pragma once

// Dense MLA decode, 64 query rows per CTA.
//
// Tile       64 rows (heads of one or more query tokens) x 64 keys x 576; O is 64 x 512 fp32 in registers.
// Threads    384: two consumer warpgroups (WG0, WG1) and a producer warpgroup of which two threads work
//            (keys, Q), in clusters four, one for each half of each key slot.
// Shared     Q 72 KB | two key tiles, slot 0 and slot 1, 72 KB each | row statistics 1.5 KB | barriers.
//            Made of 64-column chunks (8 KB, 128-byte swizzle); chunks 0-3, 4-7 and 8 of a slot have a "full"
//            barrier each. A slot's ninth chunk, the rope part, is used by Q K^T alone; P overwrites it. In
//            clusters a finished O (64 KB) leaves through slot 1, by the copy engine, while the next request
//            begins in slot 0.
// Registers  consumers 232 (O half 128, S 32, P 16, a chunk of Q 16), producers 40, through setmaxnreg. With
//            240 and 24 the producers keep what they copy by in local memory: 3% slower where work is
//            compute-bound.
//
// The consumers take tiles in pairs: see consumer.cuh.
//
// Softmax is taken relative to a reference that moves only when a row's maximum exceeds it by more than 2^8
// (kMaxGrowth), so that O is almost never rescaled; P stays within range of fp16 and bf16 and the final
// division by the sum makes the result independent of the reference.
//
// With a cluster of two CTAs, both work on the same keys for different rows: each loads half of the chunks
// and multicasts them to both, which halves the traffic from L2.

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_decode/sm90/consumer.cuh"
#include "kernels/attention/dense_decode/sm90/producer.cuh"
#include "kernels/attention/dense_decode/sm90/smem.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90 {

// The chain part -> request -> page -> keys is what a small batch waits for first; the producer's idle warps
// bring its tables into L2 while barriers are set up. Only a hint: nothing is read before the kernels ahead
// have finished.
__device__ __forceinline__ void prefetch_metadata(const DecodeParams& p, int warp) {
  constexpr int kLine = 32;  // int32
  constexpr int kMaxLines = 128;
  if (threadIdx.x % 32 == 0 && warp == 8)
    ptx::prefetch_l2(p.parts + static_cast<std::int64_t>(blockIdx.z) * 8);
  const std::int32_t* from = warp == 9 ? p.cache_seqlens : warp == 10 ? p.num_splits : p.block_table;
  const std::int64_t count = warp < 11 ? p.batch : p.batch * p.block_table_stride;
  if (warp < 9 || count > kLine * kMaxLines) return;
  for (int i = static_cast<int>(threadIdx.x) % 32 * kLine; i < count; i += 32 * kLine)
    ptx::prefetch_l2(from + i);
}

template <bool kBf16, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    dense_decode_kernel(const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap q_rope_map,
                        const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap k_piece_map,
                        const __grid_constant__ CUtensorMap out_map, const DecodeParams p,
                        const int q_rope_chunk) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s = *reinterpret_cast<DecodeSmem<ptx::Element<kBf16>>*>(
      (reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  prefetch_metadata(p, warp);
  if (warp == kConsumerThreads / 32 && threadIdx.x % 32 == 0) {
    ptx::prefetch_tensor_map(&q_map);
    ptx::prefetch_tensor_map(&q_rope_map);
    ptx::prefetch_tensor_map(&k_map);
    ptx::prefetch_tensor_map(&k_piece_map);
    if (p.out_box_chunks > 0) ptx::prefetch_tensor_map(&out_map);
    for (auto& barrier : s.q_full) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&s.q_empty, 8);
    ptx::mbarrier_init(&s.first_issued, 2);
    for (int slot = 0; slot < 2; ++slot) {
      ptx::mbarrier_init(&s.out_full[slot], 4);
      for (auto& barrier : s.kv_full[slot]) ptx::mbarrier_init(&barrier, 1);
      for (auto& barrier : s.kv_empty[slot]) ptx::mbarrier_init(&barrier, 4 * kCluster);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_arrive_relaxed();
  ptx::grid_dependency_wait();
  const PartRange part =
      part_of(p, static_cast<int>(blockIdx.z));  // on its way while the barriers are made known
  ptx::cluster_wait();
  // The combine kernel may be set up from now on; it waits for this grid to finish before it reads anything.
  ptx::grid_dependency_launch();
  if (part.begin_req < p.batch) {
    if (warp >= kConsumerThreads / 32) {
      ptx::set_max_registers_down<40>();
      if (ptx::elect_one()) {
        Producer<ptx::Element<kBf16>, kCluster>{p,
                                                s,
                                                &q_map,
                                                &q_rope_map,
                                                q_rope_chunk,
                                                &k_map,
                                                &k_piece_map,
                                                &out_map,
                                                kCluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0,
                                                static_cast<unsigned>(warp) % 4}
            .run(part);
      }
    } else if (warp < 4) {
      ptx::set_max_registers_up<232>();
      Consumer<kBf16, kCluster, 0>(p, s).run(part);
    } else {
      ptx::set_max_registers_up<232>();
      Consumer<kBf16, kCluster, 1>(p, s).run(part);
    }
  }
}

}  // namespace flash_mla::sm90
