#pragma once

// The current device.

#include <cuda_runtime_api.h>

#include "base/cuda/check.h"

namespace flash_mla {

inline constexpr int kMaxDevices = 64;  ///< CUDA devices this process can use

/// Makes a device current for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (index != before_) check(cudaSetDevice(index), "cudaSetDevice");
    changed_ = index != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace flash_mla
