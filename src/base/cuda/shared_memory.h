#pragma once

// How a kernel comes by more than 48 KB of dynamic shared memory.

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace flash_mla {

/// Lets kKernel use this much dynamic shared memory on the current device. Asks the driver once per device.
template <auto kKernel>
cudaError_t allow_shared_memory(std::size_t bytes) {
  static std::atomic<std::uint64_t> done{0};
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  const std::uint64_t bit = 1ull << (device % 64);
  if (done.load(std::memory_order_relaxed) & bit && device < 64) return cudaSuccess;
  if (const cudaError_t e = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(bytes))) {
    return e;
  }
  done.fetch_or(bit, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace flash_mla
