#include "base/fp8.h"
#include "flash_mla/info.h"
#include "kernels/quant/cpu/quantise.h"

// This file is compiled once for each instruction set.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quant/cpu/quantise_tile.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using U = hn::RebindToUnsigned<F>;

/// to_e4m3 of base/fp8.h on a vector of numbers, as words.
HWY_INLINE hn::Vec<U> ToE4m3(hn::Vec<F> x) {
  const F d;
  const U du;
  const auto bits = hn::BitCast(du, x);
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7FFFFFFFu));
  const auto odd = hn::And(hn::ShiftRight<20>(magnitude), hn::Set(du, 1u));
  // The bias goes and the rounding comes in one addition (modulo 2^32).
  const auto normal =
      hn::ShiftRight<20>(hn::Add(magnitude, hn::Add(odd, hn::Set(du, 0x7FFFFu - (120u << 23)))));
  const auto place = hn::Set(d, 0x1p14f);
  const auto subnormal =
      hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(d, magnitude), place)), hn::BitCast(du, place));
  const auto is_subnormal = hn::RebindMask(du, hn::Lt(hn::BitCast(d, magnitude), hn::Set(d, 0x1p-6f)));
  const auto saturates = hn::RebindMask(du, hn::Ge(hn::BitCast(d, magnitude), hn::Set(d, kE4m3Max)));
  auto rounded = hn::IfThenElse(is_subnormal, subnormal, normal);
  rounded = hn::IfThenElse(saturates, hn::Set(du, 0x7Eu), rounded);
  rounded = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), hn::Set(du, 0x7Fu), rounded);
  return hn::Or(rounded, hn::ShiftLeft<7>(hn::ShiftRight<31>(bits)));
}

float QuantiseTile(const float* x, int n, Fp8Recipe recipe, E4m3* values) {
  const F d;
  const U du;
  const hn::RebindToSigned<F> di;
  const hn::Rebind<std::uint8_t, F> d8;
  const int lanes = static_cast<int>(hn::Lanes(d));
  auto highest = hn::Zero(d);
  for (int i = 0; i < n; i += lanes) {
    const auto magnitude = hn::Abs(hn::LoadU(d, x + i));
    // A comparison with NaN is false and keeps what was there.
    highest = hn::IfThenElse(hn::Gt(magnitude, highest), magnitude, highest);
  }
  const float scale = quant::tile_scale(recipe, hn::GetLane(hn::MaxOfLanes(d, highest)));
  const bool multiplies = recipe == Fp8Recipe::kSglang;
  const auto factor = hn::Set(d, multiplies ? quant::divide(1.0f, scale) : scale);
  for (int i = 0; i < n; i += lanes) {
    const auto v = hn::LoadU(d, x + i);
    auto scaled = multiplies ? hn::Mul(v, factor) : hn::Div(v, factor);
    // The reciprocal may be infinite.
    if (multiplies) scaled = hn::IfThenElse(hn::Eq(v, hn::Zero(d)), v, scaled);
    hn::StoreU(hn::DemoteTo(d8, hn::BitCast(di, ToE4m3(scaled))), d8,
               reinterpret_cast<std::uint8_t*>(values) + i);
  }
  (void)du;
  return scale;
}

}  // namespace

extern float (*const kQuantiseTile)(const float*, int, Fp8Recipe, E4m3*);
float (*const kQuantiseTile)(const float*, int, Fp8Recipe, E4m3*) = QuantiseTile;

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu {

float quantise_tile(const float* x, int n, Fp8Recipe recipe, E4m3* values) {
  static const auto chosen = [] {
    [[maybe_unused]] const std::string isa = cpu_isa().selected;
#if HWY_TARGETS & HWY_AVX3
    if (isa.starts_with("avx512")) return N_AVX3::kQuantiseTile;
#endif
#if HWY_TARGETS & HWY_AVX2
    if (isa.starts_with("avx")) return N_AVX2::kQuantiseTile;
#endif
    return HWY_NAMESPACE::kQuantiseTile;  // here that of HWY_STATIC_TARGET
  }();
  return chosen(x, n, recipe, values);
}

}  // namespace flash_mla::cpu
#endif  // HWY_ONCE
