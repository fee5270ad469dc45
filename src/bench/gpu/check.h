#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace flash_mla::bench::gpu {

// Without fmt, whose header nvcc cannot compile.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace flash_mla::bench::gpu
