#include "model/cpu_rows.h"

#include <algorithm>
#include <cmath>

#include "cpu/element.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "model/cpu_rows.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::model::rows {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::ScalableTag<float>;
using Vec = hn::Vec<Floats>;
using Bits = hn::RebindToUnsigned<Floats>;
using Halves = hn::Rebind<std::uint16_t, Floats>;

// A row as the loops see it: vectors of floats, whatever is stored.
struct Float32 {
  static Vec load(const void* x, std::int64_t i) {
    return hn::LoadU(Floats(), static_cast<const float*>(x) + i);
  }
  static void store(Vec v, void* x, std::int64_t i) { hn::StoreU(v, Floats(), static_cast<float*>(x) + i); }
  static float get(const void* x, std::int64_t i) { return static_cast<const float*>(x)[i]; }
  static void set(float v, void* x, std::int64_t i) { static_cast<float*>(x)[i] = v; }
};

struct BFloat16 {
  static Vec load(const void* x, std::int64_t i) {
    const auto bits = hn::LoadU(Halves(), static_cast<const std::uint16_t*>(x) + i);
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(Bits(), bits)));
  }
  static void store(Vec v, void* x, std::int64_t i) {
    // Round to nearest, ties to even. A NaN's payload must not round over into the sign.
    const Bits d;
    const auto bits = hn::BitCast(d, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d, 1u));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d, 0x7FFFu))));
    const auto nan = hn::RebindMask(d, hn::IsNaN(v));
    const auto chosen = hn::IfThenElse(nan, hn::Set(d, 0x7FC0u), rounded);
    const hn::RebindToSigned<Floats> di;
    hn::StoreU(hn::DemoteTo(Halves(), hn::BitCast(di, chosen)), Halves(), static_cast<std::uint16_t*>(x) + i);
  }
  static float get(const void* x, std::int64_t i) {
    return cpu::to_float(static_cast<const cpu::Bf16*>(x)[i]);
  }
  static void set(float v, void* x, std::int64_t i) { static_cast<cpu::Bf16*>(x)[i] = cpu::to_bf16(v); }
};

std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(Floats())); }

template <class F>
auto with_type(DType dtype, F&& f) {
  return dtype == DType::kBFloat16 ? f(BFloat16()) : f(Float32());
}

void Widen(const void* x, DType dtype, float* out, std::int64_t n) {
  with_type(dtype, [&](auto t) HWY_ATTR {
    std::int64_t i = 0;
    for (; i + lanes() <= n; i += lanes()) hn::StoreU(t.load(x, i), Floats(), out + i);
    for (; i < n; ++i) out[i] = t.get(x, i);
  });
}

void Narrow(const float* x, void* out, DType dtype, std::int64_t n) {
  with_type(dtype, [&](auto t) HWY_ATTR {
    std::int64_t i = 0;
    for (; i + lanes() <= n; i += lanes()) t.store(hn::LoadU(Floats(), x + i), out, i);
    for (; i < n; ++i) t.set(x[i], out, i);
  });
}

void RmsNorm(const void* x, const float* weight, float eps, void* out, DType dtype, std::int64_t n) {
  with_type(dtype, [&](auto t) HWY_ATTR {
    Vec squares = hn::Zero(Floats());
    std::int64_t i = 0;
    for (; i + lanes() <= n; i += lanes()) {
      const Vec v = t.load(x, i);
      squares = hn::MulAdd(v, v, squares);
    }
    float sum = hn::GetLane(hn::SumOfLanes(Floats(), squares));
    for (; i < n; ++i) sum += t.get(x, i) * t.get(x, i);
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
    const Vec factors = hn::Set(Floats(), factor);
    for (i = 0; i + lanes() <= n; i += lanes()) {
      t.store(hn::Mul(hn::Mul(t.load(x, i), factors), hn::LoadU(Floats(), weight + i)), out, i);
    }
    for (; i < n; ++i) t.set(t.get(x, i) * factor * weight[i], out, i);
  });
}

void SiluMul(const void* gate, const void* up, void* out, DType dtype, std::int64_t n) {
  with_type(dtype, [&](auto t) HWY_ATTR {
    const Floats d;
    const Vec one = hn::Set(d, 1.0f), limit = hn::Set(d, 88.0f);  // beyond, exp overflows
    std::int64_t i = 0;
    for (; i + lanes() <= n; i += lanes()) {
      const Vec g = t.load(gate, i);
      const Vec silu = hn::Div(g, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(g), limit))));
      t.store(hn::Mul(silu, t.load(up, i)), out, i);
    }
    for (; i < n; ++i) {
      const float g = t.get(gate, i);
      t.set(g / (1.0f + std::exp(-g)) * t.get(up, i), out, i);
    }
  });
}

float Max(const float* x, std::int64_t n) {
  float highest = x[0];
  std::int64_t i = 0;
  if (n >= lanes()) {
    Vec best = hn::LoadU(Floats(), x);
    for (; i + lanes() <= n; i += lanes()) best = hn::Max(best, hn::LoadU(Floats(), x + i));
    highest = hn::GetLane(hn::MaxOfLanes(Floats(), best));
  }
  for (; i < n; ++i) highest = std::max(highest, x[i]);
  return highest;
}

float ExpSum(const float* x, float factor, float shift, void* p, DType dtype, std::int64_t n) {
  return with_type(dtype, [&](auto t) HWY_ATTR {
    const Floats d;
    const Vec factors = hn::Set(d, factor), shifts = hn::Set(d, shift);
    Vec sums = hn::Zero(d);
    std::int64_t i = 0;
    for (; i + lanes() <= n; i += lanes()) {
      const Vec e = hn::Exp(d, hn::Sub(hn::Mul(hn::LoadU(d, x + i), factors), shifts));
      sums = hn::Add(sums, e);
      t.store(e, p, i);
    }
    float sum = hn::GetLane(hn::SumOfLanes(d, sums));
    for (; i < n; ++i) {
      const float e = std::exp(x[i] * factor - shift);
      sum += e;
      t.set(e, p, i);
    }
    return sum;
  });
}

void Scale(float* x, float factor, std::int64_t n) {
  const Vec factors = hn::Set(Floats(), factor);
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    hn::StoreU(hn::Mul(hn::LoadU(Floats(), x + i), factors), Floats(), x + i);
  }
  for (; i < n; ++i) x[i] *= factor;
}

void AddScaled(const float* x, float factor, float* y, std::int64_t n) {
  const Vec factors = hn::Set(Floats(), factor);
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    hn::StoreU(hn::MulAdd(hn::LoadU(Floats(), x + i), factors, hn::LoadU(Floats(), y + i)), Floats(), y + i);
  }
  for (; i < n; ++i) y[i] += factor * x[i];
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::model::rows
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::model::rows {

HWY_EXPORT(Widen);
HWY_EXPORT(Narrow);
HWY_EXPORT(RmsNorm);
HWY_EXPORT(SiluMul);
HWY_EXPORT(Max);
HWY_EXPORT(ExpSum);
HWY_EXPORT(Scale);
HWY_EXPORT(AddScaled);

void widen(const void* x, DType dtype, float* out, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(Widen)(x, dtype, out, n);
}
void narrow(const float* x, void* out, DType dtype, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(Narrow)(x, out, dtype, n);
}
void rms_norm(const void* x, const float* weight, float eps, void* out, DType dtype, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, weight, eps, out, dtype, n);
}
void silu_mul(const void* gate, const void* up, void* out, DType dtype, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(SiluMul)(gate, up, out, dtype, n);
}
float max(const float* x, std::int64_t n) { return HWY_DYNAMIC_DISPATCH(Max)(x, n); }
float exp_sum(const float* x, float scale, float shift, void* p, DType dtype, std::int64_t n) {
  return HWY_DYNAMIC_DISPATCH(ExpSum)(x, scale, shift, p, dtype, n);
}
void scale(float* x, float factor, std::int64_t n) { HWY_DYNAMIC_DISPATCH(Scale)(x, factor, n); }
void add_scaled(const float* x, float factor, float* y, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(AddScaled)(x, factor, y, n);
}

}  // namespace flash_mla::model::rows
#endif  // HWY_ONCE
