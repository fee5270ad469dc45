#include "flash_mla/tensor.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "flash_mla/dlpack.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

// Not every dlpack.h we may be built with knows every code; the numbers are part of DLPack's ABI.
constexpr int kDlInt = 0, kDlUInt = 1, kDlFloat = 2, kDlBfloat = 4;
constexpr int kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13;

std::optional<DType> dtype_from_dlpack(const DLDataType& t) {
  if (t.lanes != 1) return std::nullopt;
  switch (static_cast<int>(t.code)) {
    case kDlFloat:
      if (t.bits == 64) return DType::kFloat64;
      if (t.bits == 32) return DType::kFloat32;
      if (t.bits == 16) return DType::kFloat16;
      return std::nullopt;
    case kDlBfloat:
      if (t.bits == 16) return DType::kBFloat16;
      return std::nullopt;
    case kDlInt:
      if (t.bits == 32) return DType::kInt32;
      if (t.bits == 64) return DType::kInt64;
      return std::nullopt;
    case kDlUInt:
      if (t.bits == 8) return DType::kUInt8;
      return std::nullopt;
    default:
      return std::nullopt;
  }
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat64:
      return "float64";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

TensorView TensorView::contiguous(void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                                  Device device) {
  if (shape.size() > kMaxRank) {
    throw InvalidArgument(fmt::format("shape has rank {}, expected at most {}", shape.size(), kMaxRank));
  }
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = device;
  v.rank = static_cast<int>(shape.size());
  std::size_t i = 0;
  for (const std::int64_t extent : shape) {
    if (extent < 0) throw InvalidArgument(fmt::format("shape[{}] is {}, expected >= 0", i, extent));
    v.shape[i++] = extent;
  }
  const bool empty = v.numel() == 0;
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    v.strides[d] = stride;
    std::int64_t bytes = 0;
    if (!empty && (__builtin_mul_overflow(stride, v.shape[d], &stride) ||
                   __builtin_mul_overflow(stride, static_cast<std::int64_t>(dtype_size(dtype)), &bytes))) {
      throw InvalidArgument(
          fmt::format("shape[{}] is {}: the tensor does not fit a 64-bit address space", d, v.shape[d]));
    }
  }
  return v;
}

std::int64_t TensorView::numel() const {
  if (rank == 0) return 0;
  const auto begin = shape.begin(), end = begin + std::clamp(rank, 0, kMaxRank);
  if (std::find(begin, end, 0) != end) return 0;
  std::int64_t n = 1;
  for (auto extent = begin; extent != end; ++extent) {
    if (__builtin_mul_overflow(n, *extent, &n)) return std::numeric_limits<std::int64_t>::max();
  }
  return n;
}

TensorView from_dlpack(const DLTensor& t, const char* name) {
  TensorView v;
  if (t.ndim < 0 || t.ndim > TensorView::kMaxRank) {
    throw InvalidArgument(
        fmt::format("{} has rank {}, expected 0 to {}", name, t.ndim, TensorView::kMaxRank));
  }
  if (t.ndim > 0 && t.shape == nullptr) {
    throw InvalidArgument(fmt::format("{} has rank {} but no shape", name, t.ndim));
  }
  const std::optional<DType> dtype = dtype_from_dlpack(t.dtype);
  if (!dtype) {
    throw InvalidArgument(fmt::format(
        "{} has DLPack dtype (code {}, {} bits, {} lanes), expected float16, bfloat16, float32, float64, "
        "int32, int64 or uint8 with one lane",
        name, static_cast<int>(t.dtype.code), static_cast<int>(t.dtype.bits),
        static_cast<int>(t.dtype.lanes)));
  }
  v.dtype = *dtype;
  switch (static_cast<int>(t.device.device_type)) {
    case kDlCpu:
    case kDlCudaHost:
      v.device = Device{DeviceType::kCpu, 0};
      break;
    case kDlCuda:
    case kDlCudaManaged:
      v.device = Device{DeviceType::kCuda, t.device.device_id};
      break;
    default:
      throw InvalidArgument(fmt::format("{} is on DLPack device type {}, expected CPU (1) or CUDA (2)", name,
                                        static_cast<int>(t.device.device_type)));
  }
  v.rank = t.ndim;
  const auto element = static_cast<std::int64_t>(dtype_size(v.dtype));
  std::int64_t dense = 1;
  bool empty = false;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] < 0) {
      throw InvalidArgument(fmt::format("{}.shape[{}] is {}, expected >= 0", name, i, t.shape[i]));
    }
    empty = empty || t.shape[i] == 0;
  }
  std::int64_t reach = 0;  // bytes from the first to the last element
  for (int i = t.ndim; i-- > 0;) {
    const auto d = static_cast<std::size_t>(i);
    v.shape[d] = t.shape[i];
    v.strides[d] = t.strides != nullptr ? t.strides[i] : dense;
    std::int64_t span = 0;
    const bool overflow = !empty && (__builtin_mul_overflow(dense, v.shape[d], &dense) ||
                                     __builtin_mul_overflow(v.shape[d] - 1, v.strides[d], &span) ||
                                     __builtin_mul_overflow(span, element, &span) ||
                                     __builtin_add_overflow(reach, span < 0 ? 0 : span, &reach));
    if (overflow) {
      throw InvalidArgument(
          fmt::format("{}.shape[{}] is {} with stride {}: the tensor does not fit a 64-bit address space",
                      name, i, t.shape[i], v.strides[d]));
    }
  }
  // Checked as integers: a pointer must not overflow even for a moment.
  std::uintptr_t address = 0;
  if (__builtin_add_overflow(reinterpret_cast<std::uintptr_t>(t.data), t.byte_offset, &address)) {
    throw InvalidArgument(
        fmt::format("{}.byte_offset is {}, expected one within the address space", name, t.byte_offset));
  }
  v.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  return v;
}

DLTensor to_dlpack(TensorView& v) {
  DLTensor t{};
  t.data = v.data;
  t.device.device_type = static_cast<DLDeviceType>(v.device.type == DeviceType::kCpu ? kDlCpu : kDlCuda);
  t.device.device_id = v.device.index;
  t.ndim = v.rank;
  t.shape = v.shape.data();
  t.strides = v.strides.data();
  t.byte_offset = 0;
  t.dtype.lanes = 1;
  t.dtype.bits = static_cast<std::uint8_t>(8 * dtype_size(v.dtype));
  switch (v.dtype) {
    case DType::kFloat64:
    case DType::kFloat32:
    case DType::kFloat16:
      t.dtype.code = kDlFloat;
      break;
    case DType::kBFloat16:
      t.dtype.code = kDlBfloat;
      break;
    case DType::kInt32:
    case DType::kInt64:
      t.dtype.code = kDlInt;
      break;
    case DType::kUInt8:
      t.dtype.code = kDlUInt;
      break;
  }
  return t;
}

std::string TensorView::describe() const {
  if (!defined()) return "(none)";
  std::string text = dtype_name(dtype);
  text += " (";
  for (int i = 0; i < std::min(rank, kMaxRank); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(size(i));
  }
  text += rank == 1 ? ",) on " : ") on ";
  if (device.type == DeviceType::kCpu) {
    text += "cpu";
  } else {
    text += "cuda:" + std::to_string(device.index);
  }
  return text;
}

}  // namespace flash_mla
