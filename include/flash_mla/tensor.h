#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "flash_mla/export.h"

namespace flash_mla {

/// Element type of a tensor. kFloat64 is accepted by the reference implementation only.
enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kInt64, kUInt8 };

/// Size of one element in bytes.
constexpr std::size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

/// "float32", "bfloat16", ...
FLASH_MLA_API const char* dtype_name(DType dtype);

enum class DeviceType : std::uint8_t { kCpu, kCuda };

/// Where a tensor's memory lives. `index` is the CUDA device ordinal, 0 for the CPU.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

/// A strided, typed, non-owning window on memory: pointer, dtype, device, shape and strides.
///
/// Strides count elements, not bytes. A default-constructed view (data == nullptr, rank 0) stands for
/// "not given". The view never owns or frees memory and is cheap to copy.
struct TensorView {
  static constexpr int kMaxRank = 5;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device{};
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  /// A dense row-major view. Throws InvalidArgument for a rank above kMaxRank, a negative extent, or more
  /// bytes than 64 bits count.
  FLASH_MLA_API static TensorView contiguous(void* data, DType dtype,
                                             std::initializer_list<std::int64_t> shape, Device device = {});

  bool defined() const { return rank > 0; }
  /// Elements; the largest int64 where there are more.
  FLASH_MLA_API std::int64_t numel() const;
  std::int64_t size(int dim) const { return shape[static_cast<std::size_t>(dim)]; }
  std::int64_t stride(int dim) const { return strides[static_cast<std::size_t>(dim)]; }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  /// "float32 (2, 1, 128, 576) on cpu", for messages.
  FLASH_MLA_API std::string describe() const;
};

}  // namespace flash_mla
