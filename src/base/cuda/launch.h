#pragma once

// The one way to launch a kernel:
//
//   launch(LaunchConfig(grid, threads, shared_bytes, stream).cluster(2).programmatic(), kernel, args...)

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

namespace flash_mla {

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

  /// Clusters of that many CTAs along x.
  LaunchConfig& cluster(unsigned ctas) {
    if (ctas == 1) return *this;
    cudaLaunchAttribute& a = attributes_[config_.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = ctas;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
    return *this;
  }
  /// May start while the kernel before it on the stream still runs. Every kernel launched so calls
  /// ptx::grid_dependency_wait() in all its threads before it touches what another kernel wrote or reads.
  LaunchConfig& programmatic(bool on = true) {
    if (!on) return *this;
    cudaLaunchAttribute& a = attributes_[config_.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
    return *this;
  }
  /// All CTAs are resident together, or the launch fails.
  LaunchConfig& cooperative() {
    cudaLaunchAttribute& a = attributes_[config_.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
    return *this;
  }
  const cudaLaunchConfig_t& get() const { return config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[3]{};
};

/// Queues the kernel; of an empty grid, nothing.
template <class... Args>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Args...), std::type_identity_t<Args>... args) {
  const dim3& grid = config.get().gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  return cudaLaunchKernelEx(&config.get(), kernel, args...);
}

}  // namespace flash_mla
