#include "kernels/cache/cpu/dequantise.h"

#include <cstring>

#include "base/fp8.h"
#include "flash_mla/info.h"

// This file is compiled once for each instruction set.
#ifndef FLASH_MLA_CACHE_CPU_DEQUANTISE_TABLE
#define FLASH_MLA_CACHE_CPU_DEQUANTISE_TABLE
namespace flash_mla::cpu {
struct DequantiseTable {
  void (*e4m3)(const std::byte* from, int n, float scale, float* out);
  void (*bf16)(const std::byte* from, int n, float* out);
};
}  // namespace flash_mla::cpu
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cache/cpu/dequantise.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;

// n e4m3 times a scale; n is a multiple of 16, as every vector's width is a divisor of it.
//
// An e4m3 whose bits move into an fp16's (sign to sign, the rest three places below the top) is 2^-8 of its
// value, subnormals included, and fp16 to fp32 is one instruction where there is F16C. NaN is the exception.
void E4m3Row(const std::byte* from, int n, float scale, float* out) {
  const F d;
  const hn::Rebind<std::int8_t, F> d8;
  const hn::Rebind<std::int16_t, F> d16;
  const hn::Rebind<hwy::float16_t, F> dh;
  const auto* bytes = reinterpret_cast<const std::int8_t*>(from);
  const auto scales = hn::Set(d, scale * 256.0f);
  const auto kept = hn::Set(d16, static_cast<std::int16_t>(0xBF80u));
  const auto magnitude = hn::Set(d16, std::int16_t{0x3F80});
  auto nan = hn::Zero(d16);
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(d))) {
    const auto half = hn::And(hn::ShiftLeft<7>(hn::PromoteTo(d16, hn::LoadU(d8, bytes + i))), kept);
    nan = hn::Or(nan, hn::VecFromMask(d16, hn::Eq(hn::And(half, magnitude), magnitude)));
    hn::StoreU(hn::Mul(hn::PromoteTo(d, hn::BitCast(dh, half)), scales), d, out + i);
  }
  const bool overflows = !(scale < 0x1p120f);  // or the scale is NaN
  if (hn::AllFalse(d16, hn::Eq(nan, hn::Set(d16, std::int16_t{-1}))) && !overflows) return;
  for (int i = 0; i < n; ++i) out[i] = to_float(E4m3{static_cast<std::uint8_t>(from[i])}) * scale;
}

void Bf16Row(const std::byte* from, int n, float* out) {
  const F d;
  const hn::RebindToUnsigned<F> du;
  const hn::Rebind<std::uint16_t, F> dh;
  const auto* bits = reinterpret_cast<const std::uint16_t*>(from);
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(d))) {
    hn::StoreU(hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(dh, bits + i)))), d, out + i);
  }
}

}  // namespace

extern const DequantiseTable kTable;
const DequantiseTable kTable = {E4m3Row, Bf16Row};

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu {
namespace {

const DequantiseTable& table() {
  static const DequantiseTable& chosen = []() -> const DequantiseTable& {
    [[maybe_unused]] const std::string isa = cpu_isa().selected;
#if HWY_TARGETS & HWY_AVX3
    if (isa.starts_with("avx512")) return N_AVX3::kTable;
#endif
#if HWY_TARGETS & HWY_AVX2
    if (isa.starts_with("avx")) return N_AVX2::kTable;
#endif
    return HWY_NAMESPACE::kTable;  // here that of HWY_STATIC_TARGET
  }();
  return chosen;
}

}  // namespace

void dequantise(const kv::Pool& pool, const kv::Token& token, float* out) {
  const int latent = pool.latent();
  switch (pool.format) {
    case KvFormat::kFp8V32:
      for (int t = 0; t < kv::Fp8V32::kScales; ++t) {
        float scale = 0;
        std::memcpy(&scale, token.scales + t * sizeof(scale), sizeof(scale));
        const int at = t * kv::Fp8V32::kTile;
        table().e4m3(token.latent + at, kv::Fp8V32::kTile, scale, out + at);
      }
      break;
    case KvFormat::kFp8V4:
      for (int t = 0; t < kv::Fp8V4::kScales; ++t) {
        const int at = t * kv::Fp8V4::kTile;
        table().e4m3(token.latent + at, kv::Fp8V4::kTile,
                     to_float(E8m0{static_cast<std::uint8_t>(token.scales[t])}), out + at);
      }
      break;
    case KvFormat::kFp8Tensor:
      table().e4m3(token.latent, kv::Fp8Tensor::kTokenBytes, pool.scale, out);
      return;
    case KvFormat::kBFloat16:
      table().bf16(token.latent, pool.d_qk, out);
      return;
    case KvFormat::kFloat16:
      for (int i = 0; i < pool.d_qk; ++i) {
        Fp16 x{};
        std::memcpy(&x, token.latent + 2 * static_cast<std::ptrdiff_t>(i), sizeof(x));
        out[i] = to_float(x);
      }
      return;
  }
  table().bf16(token.rope, kv::kRopeWidth, out + latent);
}

}  // namespace flash_mla::cpu
#endif  // HWY_ONCE
