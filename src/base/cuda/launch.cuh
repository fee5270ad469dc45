#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "base/cuda/check.h"

namespace flash_mla::model::cuda {

/// Launches a kernel that may start while the one before it on the stream still runs. Every kernel launched
/// so calls wait_for_previous() in all its threads before it touches what another kernel wrote or reads.
template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, unsigned threads, std::size_t smem, cudaStream_t stream,
            std::type_identity_t<Args>... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), "cudaLaunchKernelEx");
}

/// Until all kernels before are done and their writes are visible.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// From here on the next kernel may start.
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace flash_mla::model::cuda
