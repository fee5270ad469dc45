#include "kernels/gemm/cpu/panel.h"

#include <string>

#include "base/element.h"
#include "flash_mla/info.h"
#include "kernels/attention/dense_decode/cpu/isa.h"

// Compiled once for each instruction set, see the foot of the file for how one is chosen.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/cpu/panel.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

// Panels in fp32 arithmetic: one depth after the other, 64 columns each, in 4 or 8 bits or fp32.

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu::panel {
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

void PackPlain(const float* values, std::int64_t stride, std::int64_t depth, void* panel) {
  auto* out = static_cast<float*>(panel);
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t c = 0; c < kColumns; ++c) out[k * kColumns + c] = values[c * stride + k];
  }
}

/// Of 4 bits a byte holds a column of the first half, and in its high bits that of the second.
void PackCodes(Codes codes, const std::uint8_t* values, std::int64_t stride, std::int64_t depth,
               void* panel) {
  auto* out = static_cast<std::uint8_t*>(panel);
  for (std::int64_t k = 0; k < depth; ++k) {
    if (codes == Codes::kInt4) {
      for (std::int64_t c = 0; c < kColumns / 2; ++c) {
        *out++ =
            static_cast<std::uint8_t>(values[c * stride + k] | values[(c + kColumns / 2) * stride + k] << 4);
      }
    } else {
      for (std::int64_t c = 0; c < kColumns; ++c) *out++ = values[c * stride + k];
    }
  }
}

using Bytes = hn::Rebind<std::uint8_t, Floats>;

Vec ValuesOfInt8(hn::Vec<Bytes> codes) {
  const hn::RebindToSigned<Floats> d32;
  const hn::RebindToSigned<Bytes> d8;
  return hn::ConvertTo(Floats(), hn::PromoteTo(d32, hn::BitCast(d8, codes)));
}

Vec ValuesOfE4m3(hn::Vec<Bytes> codes) {
  const Floats d;
  const hn::RebindToUnsigned<Floats> du;
  const hn::RebindToSigned<Floats> di;
  const auto bits = hn::PromoteTo(du, codes);
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7Fu));
  const auto sign = hn::ShiftLeft<24>(hn::And(bits, hn::Set(du, 0x80u)));
  const Vec normal = hn::BitCast(d, hn::Add(hn::ShiftLeft<20>(magnitude), hn::Set(du, 120u << 23)));
  const Vec subnormal = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, magnitude)), hn::Set(d, 0x1p-9f));
  const auto is_normal = hn::Gt(hn::BitCast(di, magnitude), hn::Set(di, 7));
  return hn::Or(hn::IfThenElse(hn::RebindMask(d, is_normal), normal, subnormal), hn::BitCast(d, sign));
}

Vec ValuesOfInt4(hn::Vec<Bytes> codes) {
  const hn::RebindToSigned<Floats> d32;
  return hn::ConvertTo(Floats(), hn::Sub(hn::PromoteTo(d32, codes), hn::Set(d32, 8)));
}

void Expand(Codes codes, const void* packed, std::int64_t depth, void* plain) {
  const Floats d;
  const Bytes d8;
  const auto* in = static_cast<const std::uint8_t*>(packed);
  auto* out = static_cast<float*>(plain);
  if (codes == Codes::kInt4) {
    constexpr std::int64_t kHalf = kColumns / 2;
    for (std::int64_t k = 0; k < depth; ++k, in += kHalf, out += kColumns) {
      for (std::int64_t c = 0; c < kHalf; c += kLanes) {
        const auto bytes = hn::LoadU(d8, in + c);
        hn::StoreU(ValuesOfInt4(hn::And(bytes, hn::Set(d8, 15))), d, out + c);
        hn::StoreU(ValuesOfInt4(hn::ShiftRight<4>(bytes)), d, out + kHalf + c);
      }
    }
    return;
  }
  for (std::int64_t i = 0; i < depth * kColumns; i += kLanes) {
    const auto bytes = hn::LoadU(d8, in + i);
    hn::StoreU(codes == Codes::kInt8 ? ValuesOfInt8(bytes) : ValuesOfE4m3(bytes), d, out + i);
  }
}

template <class T>
void Finish(const Block& b, std::int64_t row) {
  auto* y = reinterpret_cast<T*>(b.y + row * b.y_stride);
  for (std::int64_t i = 0; i < b.columns; ++i) {
    float value = b.sums[row * kColumns + i];
    if (b.scale != nullptr) value *= b.scale[i];
    if (b.bias != nullptr) value += b.bias[i];
    if (b.accumulate) value += to_float(y[i]);
    y[i] = from_double<T>(value);
  }
}

template <class T, std::int64_t R>
void MultiplyRows(const Block& b, const float* plain, std::int64_t row) {
  const Floats d;
  float* sums = b.sums + row * kColumns;
  const std::byte* x = b.x + row * b.x_stride;
  for (std::int64_t c = 0; c < kColumns; c += kStep) {
    Vec acc[R * kVectors];
    for (std::int64_t i = 0; i < R * kVectors; ++i) {
      acc[i] =
          b.first ? hn::Zero(d) : hn::LoadU(d, sums + i / kVectors * kColumns + c + i % kVectors * kLanes);
    }
    for (std::int64_t k = 0; k < b.depth; ++k) {
      Vec w[kVectors];
      for (std::int64_t v = 0; v < kVectors; ++v) w[v] = hn::LoadU(d, plain + k * kColumns + c + v * kLanes);
      for (std::int64_t r = 0; r < R; ++r) {
        const Vec value = hn::Set(d, to_float(reinterpret_cast<const T*>(x + r * b.x_stride)[k]));
        for (std::int64_t v = 0; v < kVectors; ++v) {
          acc[r * kVectors + v] = hn::MulAdd(value, w[v], acc[r * kVectors + v]);
        }
      }
    }
    for (std::int64_t i = 0; i < R * kVectors; ++i) {
      hn::StoreU(acc[i], d, sums + i / kVectors * kColumns + c + i % kVectors * kLanes);
    }
  }
  if (!b.last) return;
  for (std::int64_t r = row; r < row + R; ++r) {
    b.y_dtype == DType::kBFloat16 ? Finish<Bf16>(b, r) : Finish<float>(b, r);
  }
}

/// The rows from `row` on, at most R.
template <class T, std::int64_t R>
void MultiplyRest(const Block& b, const float* plain, std::int64_t row) {
  if (b.rows - row == R) return MultiplyRows<T, R>(b, plain, row);
  if constexpr (R > 1) MultiplyRest<T, R - 1>(b, plain, row);
}

template <class T>
void Multiply(const Block& b, const void* plain) {
  const auto* panel = static_cast<const float*>(plain);
  std::int64_t row = 0;
  for (; row + kRows <= b.rows; row += kRows) MultiplyRows<T, kRows>(b, panel, row);
  MultiplyRest<T, kRows - 1>(b, panel, row);
}

consteval Kernel kernel_of(auto multiply) {
  return {1, 4, 0, PackPlain, PackCodes, Expand, multiply, nullptr};
}

}  // namespace

// Made by the compiler: nothing of another instruction set runs before main.
extern const Kernel kFloat32Kernel, kBFloat16Kernel;
constinit const Kernel kFloat32Kernel = kernel_of(Multiply<float>);
constinit const Kernel kBFloat16Kernel = kernel_of(Multiply<Bf16>);

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu::panel
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu::panel {

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

bool multiplies_bfloat16_pairs() {
  __builtin_cpu_init();
  return has_bf16_pairs(cpu_isa().selected) && __builtin_cpu_supports("avx512vbmi") != 0;
}

const Kernel& select_kernel(DType dtype) {
  return dtype == DType::kBFloat16 && multiplies_bfloat16_pairs() ? avx512_bf16_kernel()
                                                                  : highway_kernel(dtype);
}

}  // namespace flash_mla::cpu::panel
#endif  // HWY_ONCE
