#include "model/cpu_panel.h"

#include <string>

#include "cpu/element.h"
#include "flash_mla/info.h"

// Compiled once for each instruction set, see the foot of the file for how one is chosen.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "model/cpu_panel.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

// Panels in fp32 arithmetic. Packed: one depth after the other, 64 columns each; expanded: the same in fp32.

HWY_BEFORE_NAMESPACE();
namespace flash_mla::model::panel {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::ScalableTag<float>;
using Vec = hn::Vec<Floats>;

constexpr std::int64_t kLanes = HWY_LANES(float);
// Accumulators of a step: 24 of AVX-512's 32 registers, 8 of the 16 that others have.
constexpr std::int64_t kVectors = kLanes >= 16 ? 4 : 2;
constexpr std::int64_t kRows = kLanes >= 16 ? 6 : 4;
constexpr std::int64_t kStep = kVectors * kLanes;
static_assert(kColumns % kStep == 0);

void Pack(const std::int8_t* values, std::int64_t stride, std::int64_t depth, std::uint8_t* packed) {
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t c = 0; c < kColumns; ++c) {
      packed[k * kColumns + c] = static_cast<std::uint8_t>(values[c * stride + k]);
    }
  }
}

void Expand(const std::uint8_t* packed, std::int64_t depth, void* expanded) {
  const Floats d;
  const hn::RebindToSigned<Floats> d32;
  const hn::Rebind<std::int8_t, Floats> d8;
  auto* out = static_cast<float*>(expanded);
  for (std::int64_t i = 0; i < depth * kColumns; i += kLanes) {
    const auto bytes = hn::LoadU(d8, reinterpret_cast<const std::int8_t*>(packed) + i);
    hn::StoreU(hn::ConvertTo(d, hn::PromoteTo(d32, bytes)), d, out + i);
  }
}

template <class T, std::int64_t R>
void MultiplyRows(const std::byte* x, std::ptrdiff_t stride, const float* panel, std::int64_t depth,
                  float* sums, bool add) {
  const Floats d;
  for (std::int64_t c = 0; c < kColumns; c += kStep) {
    Vec acc[R * kVectors];
    for (std::int64_t i = 0; i < R * kVectors; ++i) {
      acc[i] = add ? hn::LoadU(d, sums + i / kVectors * kColumns + c + i % kVectors * kLanes) : hn::Zero(d);
    }
    for (std::int64_t k = 0; k < depth; ++k) {
      Vec w[kVectors];
      for (std::int64_t v = 0; v < kVectors; ++v) w[v] = hn::LoadU(d, panel + k * kColumns + c + v * kLanes);
      for (std::int64_t r = 0; r < R; ++r) {
        const Vec value = hn::Set(d, cpu::to_float(reinterpret_cast<const T*>(x + r * stride)[k]));
        for (std::int64_t v = 0; v < kVectors; ++v) {
          acc[r * kVectors + v] = hn::MulAdd(value, w[v], acc[r * kVectors + v]);
        }
      }
    }
    for (std::int64_t i = 0; i < R * kVectors; ++i) {
      hn::StoreU(acc[i], d, sums + i / kVectors * kColumns + c + i % kVectors * kLanes);
    }
  }
}

template <class T, std::int64_t R>
void MultiplySome(std::int64_t rows, const std::byte* x, std::ptrdiff_t stride, const float* panel,
                  std::int64_t depth, float* sums, bool add) {
  if (rows == R) return MultiplyRows<T, R>(x, stride, panel, depth, sums, add);
  if constexpr (R > 1) MultiplySome<T, R - 1>(rows, x, stride, panel, depth, sums, add);
}

template <class T>
void Multiply(const std::byte* x, std::ptrdiff_t stride, std::int64_t rows, const void* expanded,
              std::int64_t depth, float* sums, bool add) {
  const auto* panel = static_cast<const float*>(expanded);
  std::int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    MultiplyRows<T, kRows>(x + r * stride, stride, panel, depth, sums + r * kColumns, add);
  }
  MultiplySome<T, kRows - 1>(rows - r, x + r * stride, stride, panel, depth, sums + r * kColumns, add);
}

template <class T>
void FinishRow(const float* sums, const Finish& f, void* y) {
  auto* out = static_cast<T*>(y);
  for (std::int64_t i = 0; i < f.count; ++i) {
    float value = sums[i] * f.scale[i];
    if (f.bias != nullptr) value += f.bias[i];
    if (f.accumulate) value += cpu::to_float(out[i]);
    out[i] = cpu::from_double<T>(value);
  }
}

void FinishAny(const float* sums, const Finish& f, void* y) {
  return f.dtype == DType::kBFloat16 ? FinishRow<cpu::Bf16>(sums, f, y) : FinishRow<float>(sums, f, y);
}

constexpr Kernel kernel_of(auto multiply) { return {1, 4, 0, Pack, Expand, multiply, nullptr, FinishAny}; }

}  // namespace

extern const Kernel kFloat32Kernel, kBFloat16Kernel;
const Kernel kFloat32Kernel = kernel_of(Multiply<float>);
const Kernel kBFloat16Kernel = kernel_of(Multiply<cpu::Bf16>);

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::model::panel
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::model::panel {

const Kernel& highway_kernel(DType dtype) {
  const bool bf16 = dtype == DType::kBFloat16;
  [[maybe_unused]] const std::string isa = cpu_isa().selected;
#if HWY_TARGETS & HWY_AVX3
  if (isa.starts_with("avx512")) return bf16 ? N_AVX3::kBFloat16Kernel : N_AVX3::kFloat32Kernel;
#endif
#if HWY_TARGETS & HWY_AVX2
  if (isa.starts_with("avx")) return bf16 ? N_AVX2::kBFloat16Kernel : N_AVX2::kFloat32Kernel;
#endif
  // Here those of HWY_STATIC_TARGET.
  return bf16 ? HWY_NAMESPACE::kBFloat16Kernel : HWY_NAMESPACE::kFloat32Kernel;
}

const Kernel& select_kernel(DType dtype) {
  __builtin_cpu_init();
  if (dtype == DType::kBFloat16 && cpu_isa().selected == "avx512_bf16" &&
      __builtin_cpu_supports("avx512vbmi") != 0) {
    return avx512_bf16_kernel();
  }
  return highway_kernel(dtype);
}

}  // namespace flash_mla::model::panel
#endif  // HWY_ONCE
