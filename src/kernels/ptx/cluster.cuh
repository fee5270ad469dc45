#pragma once

// Thread-block clusters, register allotment and, through its include, programmatic dependent launch.

#include <cstdint>

#include "base/cuda/grid_dependency.cuh"

namespace flash_mla::sm90::ptx {

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
/// What this thread wrote is there for all of the cluster behind cluster_wait(). Compiles to a membar.gpu.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
/// Orders nothing by itself: where nothing was written, or behind fence_barrier_init(). Not for a kernel's end: an arrival at
/// another CTA's barrier that is still under way would find the CTA gone, and the launch fails.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// True in one thread of a converged warp. Unlike a comparison of threadIdx.x it tells the compiler that
/// there is only one, which spares a loop over lanes around every instruction that takes uniform registers.
__device__ __forceinline__ bool elect_one() {
  std::uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

/// Gives registers back to the multiprocessor, or takes more; for whole warpgroups.
template <int kCount>
__device__ __forceinline__ void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace flash_mla::sm90::ptx
