#pragma once

// Dense MLA decode over FP8 caches, up to 64 query rows per CTA.
//
// Tile       64 keys x kHeads rows (16, 32 or 64: heads of one or more query tokens) x 576. Products are transposed, so
//            that e4m3 is a first factor, which wgmma takes from registers: S^T (64 keys x kHeads) = K Q^T, O^T (512
//            columns x kHeads) = V^T P^T. The cache lies in shared memory as it lies in memory.
// Threads    384: two consumer warpgroups (WG0, WG1) and one of producers, of which a warp (keys) and a thread (Q) work.
// Shared     for 64 heads: Q 72 KB | three tiles of bytes, 41 KB each | P 2 x 8 KB | statistics 5 KB | barriers. Q and P
//            are chunks of 64 columns with 128-byte swizzle.
// Registers  consumers 232 (O^T 128, S^T 32, two sets of A 32), producers 40, through setmaxnreg.
//
// The consumers take tiles in pairs: see consumer.cuh. docs/kernels/dense-fp8-decode-sm90.md has why.

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention/dense_fp8_decode/sm90/consumer.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/producer.cuh"
#include "kernels/attention/dense_fp8_decode/sm90/smem.cuh"
#include "kernels/ptx/cluster.cuh"

namespace flash_mla::sm90::dense_fp8 {

template <bool kBf16, KvFormat kFormat, int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    dense_fp8_decode_kernel(const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ DenseFp8Params p) {
  extern __shared__ std::byte dynamic_smem[];
  auto& s =
      *reinterpret_cast<Smem<kHeads>*>((reinterpret_cast<std::uintptr_t>(dynamic_smem) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == kConsumerThreads) {
    ptx::prefetch_tensor_map(&q_map);
    ptx::mbarrier_init(&s.q_full, 1);
    ptx::mbarrier_init(&s.q_empty, kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&s.kv_full[stage], 1);
      ptx::mbarrier_init(&s.kv_empty[stage], kConsumerWarps);
    }
    ptx::fence_barrier_init();
  }
  ptx::grid_dependency_wait();
  const PartRange part = part_of(p, static_cast<int>(blockIdx.z));
  __syncthreads();
  // The combine kernel may be set up from now on; it waits for this grid to finish before it reads anything.
  ptx::grid_dependency_launch();
  if (part.begin_req >= p.batch) return;
  if (warp >= kConsumerWarps) {
    ptx::set_max_registers_down<40>();
    const Producer<kFormat, kHeads> producer{p, s};
    if (warp == kConsumerWarps) {
      producer.bring_keys(part, static_cast<int>(threadIdx.x) % 32);
    } else if (warp == kConsumerWarps + 1 && ptx::elect_one()) {
      producer.bring_q(part, &q_map);
    }
  } else if (warp < kConsumerWarps / 2) {
    ptx::set_max_registers_up<232>();
    Consumer<kBf16, kFormat, kHeads, 0>(p, s).run(part);
  } else {
    ptx::set_max_registers_up<232>();
    Consumer<kBf16, kFormat, kHeads, 1>(p, s).run(part);
  }
}

}  // namespace flash_mla::sm90::dense_fp8
