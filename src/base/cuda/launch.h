#pragma once

// What launches of the model's kernels have in common.

#include <cuda_runtime.h>

#include <cstddef>

#include "base/cuda/shared_memory.h"

namespace flash_mla::model::cuda {

/// A launch configuration with its attributes.
class LaunchConfig {
 public:
  LaunchConfig(dim3 grid, unsigned threads, std::size_t shared_bytes, cudaStream_t stream) {
    config_.gridDim = grid;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  void cluster(unsigned ctas) {
    if (ctas == 1) return;
    cudaLaunchAttribute& a = attributes_[config_.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = ctas;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  /// May start while the kernel before is still running; the kernel itself waits (griddepcontrol.wait).
  void programmatic(bool on) {
    if (!on) return;
    cudaLaunchAttribute& a = attributes_[config_.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  /// All CTAs are resident together, or the launch fails.
  void cooperative() {
    cudaLaunchAttribute& a = attributes_[config_.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[3]{};
};

using sm90::allow_shared_memory;

/// Of the current device.
inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace flash_mla::model::cuda
