#pragma once

// What the host sides of the kernels share: CUDA errors as exceptions, the current device, tensor maps.

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "flash_mla/tensor.h"

namespace flash_mla::sm90 {

inline constexpr int kMaxDevices = 64;  ///< CUDA devices this process can use

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

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

/// One dimension of a tensor map: its size, the bytes from one index to the next (none for the innermost),
/// and how much of it a box covers.
struct MapDim {
  std::int64_t size;
  std::int64_t stride_bytes;
  int box;
};

/// A tensor map of 16-bit elements, innermost dimension (64 contiguous columns) first, with 128-byte swizzle.
/// Throws InvalidArgument naming `name` for a layout that none can describe.
CUtensorMap encode_tensor_map(const char* name, const TensorView& t, std::span<const MapDim> dims);
template <std::size_t kRank>
CUtensorMap tensor_map(const char* name, const TensorView& t, const std::array<MapDim, kRank>& dims) {
  return encode_tensor_map(name, t, dims);
}

/// Throws InvalidArgument for data or outer strides that are not multiples of 16 bytes.
void require_stride(const TensorView& t, const char* name);

}  // namespace flash_mla::sm90
