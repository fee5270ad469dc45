#pragma once

// CUDA calls that throw, and memory that frees itself.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/cuda/check.h"

namespace flash_mla::gpu_test {

/// Device memory from the default pool, which keeps what is freed: thousands of cases reuse it.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    static const bool kKept = [] {
      cudaMemPool_t pool = nullptr;
      check(cudaDeviceGetDefaultMemPool(&pool, 0), "cudaDeviceGetDefaultMemPool");
      std::uint64_t all = ~0ull;
      check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "cudaMemPoolSetAttribute");
      return true;
    }();
    static_cast<void>(kKept);
    check(cudaMallocAsync(&data_, bytes + 256, nullptr), "cudaMallocAsync");
  }
  ~DeviceMemory() { cudaFreeAsync(data_, nullptr); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }
  /// Every byte 0xFF: NaN as bfloat16, float16 and float32, -1 as an integer.
  void poison() { check(cudaMemsetAsync(data_, 0xFF, bytes_, nullptr), "cudaMemsetAsync"); }
  void upload(const void* from, std::size_t bytes) {
    check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  template <class T>
  std::vector<T> download() const {
    std::vector<T> v(bytes_ / sizeof(T));
    check(cudaMemcpy(v.data(), data_, v.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return v;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

}  // namespace flash_mla::gpu_test
