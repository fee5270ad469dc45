#pragma once

// Warp-level matrix products and per-thread asynchronous copies (PTX ISA, "mma.sync", "cp.async").

#include <cstdint>

#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {

/// d (16 x 8) += a (16 x 16) b (16 x 8), bf16 with fp32 sums. With g = lane / 4 and t = lane % 4: a holds
/// (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), b holds (2t.., g), (2t + 8.., g), d holds
/// (g, 2t..), (g + 8, 2t..), neighbours in pairs.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], std::uint32_t a0, std::uint32_t a1,
                                                  std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                                  std::uint32_t b1) {
  // Not volatile: the compiler may move it among loads.
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// The same, of fp16 where not kBf16.
template <bool kBf16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  if constexpr (kBf16) {
    mma_m16n8k16_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// 16 bytes from global to shared memory; only the first `bytes` (0 or 16) are read, zeros fill the rest.
__device__ __forceinline__ void cp_async_16(std::uint32_t smem, const void* global, std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes)
               : "memory");
}
/// The same of 4 bytes.
__device__ __forceinline__ void cp_async_4(std::uint32_t smem, const void* global, std::uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Arrives at `barrier`, whose count includes this arrival, once this thread's copies so far are complete.
__device__ __forceinline__ void cp_async_arrive(std::uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier))
               : "memory");
}

/// The same address in CTA `rank` of the cluster.
__device__ __forceinline__ float4 load_cluster_16(std::uint32_t smem, std::uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n"
      "}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(smem), "r"(rank)
      : "memory");
  return v;
}

}  // namespace flash_mla::sm90::ptx
