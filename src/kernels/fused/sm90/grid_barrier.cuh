#pragma once

// All CTAs of a grid wait for each other. They have to be resident together: a cooperative launch.

#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90 {

/// Counts arrivals since the kernel began. The counter is 0 before the kernel and after finish(). kThreads
/// threads of each CTA take part, the first of them and all of their warps; kId is a named barrier of theirs.
template <int kId, int kThreads>
class GridBarrier {
 public:
  __device__ explicit GridBarrier(unsigned* counter) : counter_(counter) {}

  /// One of `ctas` CTAs, if it `takes_part`. What its threads wrote before is there for those that wait. All
  /// CTAs call this; nobody may be able to arrive at a barrier before all have arrived at the one in front.
  __device__ void arrive(unsigned ctas, bool takes_part = true) {
    target_ += ctas;
    if (!takes_part) return;
    ptx::named_barrier_sync<kId, kThreads>();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
  }
  /// Counts a barrier in without taking part.
  __device__ void expect(unsigned ctas) { target_ += ctas; }
  /// For the arrivals so far. Data is then read from L2 (__ldcg): this orders one thread alone.
  __device__ void wait() {
    if (threadIdx.x == 0) poll();
    ptx::named_barrier_sync<kId, kThreads>();
  }
  /// The same for one warp.
  __device__ void wait_in_warp() {
    if (threadIdx.x % 32 == 0) poll();
    __syncwarp();
  }
  /// Instead of the last arrival, by all CTAs. True in one thread of the grid, when nobody waits any more.
  __device__ bool finish() {
    target_ += gridDim.x;
    if (threadIdx.x != 0 || atomicAdd(counter_, 1) + 1 != target_) return false;
    *counter_ = 0;
    return true;
  }

 private:
  __device__ void poll() const {
    unsigned arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter_) : "memory");
    } while (arrived < target_);
  }

  unsigned* counter_;
  unsigned target_ = 0;
};

}  // namespace flash_mla::sm90
