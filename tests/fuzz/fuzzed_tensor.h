#pragma once

// A DLTensor made from arbitrary bytes: plausible, or bent in one field, or a phantom (see fuzz_c_api.cpp).

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "flash_mla/c_api.h"

namespace flash_mla::fuzz {

inline constexpr std::int64_t kMaxBytes = 1 << 16;

struct Tensor {
  DLTensor t{};
  std::array<std::int64_t, 8> shape{}, strides{};
  std::vector<std::uint8_t> memory;
  bool phantom = false;
  bool bent = false;
};

// Extents around which products overflow.
inline std::int64_t extreme(FuzzedDataProvider& in) {
  const std::int64_t power = std::int64_t{1} << in.ConsumeIntegralInRange(16, 62);
  return power + in.ConsumeIntegralInRange(-1, 1);
}

// A plausible tensor that some field of may be bent.
inline void make(FuzzedDataProvider& in, Tensor& x, std::vector<std::int64_t> shape, DLDataType dtype) {
  for (std::size_t i = 0; i < shape.size(); ++i) x.shape[i] = shape[i];
  x.t.ndim = static_cast<int>(shape.size());
  x.t.dtype = dtype;
  x.t.device.device_type = kDLCPU;
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    x.strides[i] = stride;
    if (__builtin_mul_overflow(stride, std::max<std::int64_t>(shape[i], 1), &stride)) stride = 0;
  }
  x.bent = in.ConsumeIntegralInRange(0, 3) == 0;
  if (x.bent) {
    const auto dim = in.ConsumeIntegralInRange<std::size_t>(0, 4);
    switch (in.ConsumeIntegralInRange(0, 7)) {
      case 0:
        x.shape[dim] = in.ConsumeIntegral<std::int64_t>();
        break;
      case 1:
        x.shape[dim] = in.ConsumeIntegralInRange<std::int64_t>(-1, 5);
        break;
      case 2:
        x.strides[dim] = in.ConsumeIntegral<std::int64_t>();
        break;
      case 3:
        x.strides[dim] = in.ConsumeIntegralInRange<std::int64_t>(-2, 3);
        break;
      case 4:
        x.t.ndim = in.ConsumeIntegralInRange(-1, 7);
        break;
      case 5:
        x.t.dtype = {in.ConsumeIntegral<std::uint8_t>(), in.ConsumeIntegral<std::uint8_t>(), 1};
        break;
      case 6:
        x.t.device.device_type = static_cast<DLDeviceType>(in.ConsumeIntegralInRange(0, 15));
        break;
      default:
        x.t.dtype.lanes = in.ConsumeIntegral<std::uint16_t>();
    }
  }
  x.t.shape = x.shape.data();
  x.t.strides = in.ConsumeIntegralInRange(0, 7) == 0 && !x.bent ? nullptr : x.strides.data();
  // The bytes the tensor reaches; unreachable ones are not provided.
  __int128 reach = 1;
  for (int i = 0; i < std::min(std::max(x.t.ndim, 0), 8); ++i) {
    const auto d = static_cast<std::size_t>(i);
    if (x.shape[d] <= 0) {
      reach = 0;
      break;
    }
    if (x.strides[d] > 0) reach += static_cast<__int128>(x.shape[d] - 1) * x.strides[d];
    if (reach > kMaxBytes) break;
  }
  x.phantom = reach > kMaxBytes;
  const auto elements = static_cast<std::int64_t>(x.phantom ? kMaxBytes : reach);
  x.memory.assign(static_cast<std::size_t>(elements * std::max(x.t.dtype.bits / 8, 1)), 0x3C);
  x.t.data = x.phantom && in.ConsumeBool() ? nullptr : x.memory.data();
  if (in.ConsumeIntegralInRange(0, 31) == 0) {
    x.t.byte_offset = in.ConsumeIntegral<std::uint64_t>();
    x.phantom = x.bent = true;
  }
}

// Numbers from low to high and, unless `wild` is false, now and then any other.
inline void put_ints(FuzzedDataProvider& in, Tensor& x, std::int32_t low, std::int32_t high,
                     bool wild = true) {
  for (std::size_t i = 0; i + 4 <= x.memory.size(); i += 4) {
    const std::int32_t v = wild && in.ConsumeIntegralInRange(0, 15) == 0
                               ? in.ConsumeIntegral<std::int32_t>()
                               : in.ConsumeIntegralInRange(low, high);
    std::memcpy(&x.memory[i], &v, 4);
  }
}

inline void require_message(flash_mla_status status) {
  if (status != FLASH_MLA_OK && *flash_mla_last_error() == '\0') std::abort();
}

}  // namespace flash_mla::fuzz
