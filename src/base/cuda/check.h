#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace flash_mla {

/// Throws std::runtime_error, which names `what` and says what CUDA says, for an error.
inline void check(cudaError_t error, const char* what) {
  // nvcc cannot compile fmt's header.
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace flash_mla
