#include "kernels/rows/cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/element.h"
#include "flash_mla/info.h"

// This file is compiled once for each instruction set.
#ifndef FLASH_MLA_MODEL_CPU_ROWS_TABLE
#define FLASH_MLA_MODEL_CPU_ROWS_TABLE
namespace flash_mla::cpu::rows {
struct Table {
  void (*widen)(const void*, DType, float*, std::int64_t);
  void (*narrow)(const float*, void*, DType, std::int64_t);
  void (*rms_norm)(const void*, const float*, float, void*, DType, std::int64_t);
  void (*silu_mul)(const void*, const void*, void*, DType, std::int64_t);
  void (*rotate)(void*, const float*, const float*, DType, std::int64_t);
  float (*max)(const float*, std::int64_t);
  float (*exp_sum)(const float*, float, float, void*, DType, std::int64_t);
  void (*scale)(float*, float, std::int64_t);
  void (*add_scaled)(const float*, float, float*, std::int64_t);
};
}  // namespace flash_mla::cpu::rows
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rows/cpu/rows.cpp"
#include <hwy/foreach_target.h>
//
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu::rows {
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
  /// Neighbours (2i, 2i + 1) for i from `first` on.
  static void load_pairs(const void* x, std::int64_t first, Vec& a, Vec& b) {
    hn::LoadInterleaved2(Floats(), static_cast<const float*>(x) + 2 * first, a, b);
  }
  static void store_pairs(Vec a, Vec b, void* x, std::int64_t first) {
    hn::StoreInterleaved2(a, b, Floats(), static_cast<float*>(x) + 2 * first);
  }
  static float get(const void* x, std::int64_t i) { return static_cast<const float*>(x)[i]; }
  static void set(float v, void* x, std::int64_t i) { static_cast<float*>(x)[i] = v; }
};

struct BFloat16 {
  static Vec load(const void* x, std::int64_t i) {
    const auto bits = hn::LoadU(Halves(), static_cast<const std::uint16_t*>(x) + i);
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(Bits(), bits)));
  }
  static void store(Vec v, void* x, std::int64_t i) {
    const hn::RebindToSigned<Floats> di;
    const auto bits = hn::BitCast(di, hn::ShiftRight<16>(rounded(v)));
    hn::StoreU(hn::DemoteTo(Halves(), bits), Halves(), static_cast<std::uint16_t*>(x) + i);
  }
  static void load_pairs(const void* x, std::int64_t first, Vec& a, Vec& b) {
    // Little-endian: the even element is the lower half of a word.
    const auto words = hn::LoadU(Bits(), static_cast<const std::uint32_t*>(x) + first);
    a = hn::BitCast(Floats(), hn::ShiftLeft<16>(words));
    b = hn::BitCast(Floats(), hn::And(words, hn::Set(Bits(), 0xFFFF0000u)));
  }
  static void store_pairs(Vec a, Vec b, void* x, std::int64_t first) {
    const auto high = hn::And(rounded(b), hn::Set(Bits(), 0xFFFF0000u));
    hn::StoreU(hn::Or(hn::ShiftRight<16>(rounded(a)), high), Bits(), static_cast<std::uint32_t*>(x) + first);
  }
  /// The bf16 in the upper half of each word.
  static hn::Vec<Bits> rounded(Vec v) {
    // Round to nearest, ties to even. A NaN's payload must not round over into the sign.
    const Bits d;
    const auto bits = hn::BitCast(d, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d, 1u));
    const auto sum = hn::Add(bits, hn::Add(odd, hn::Set(d, 0x7FFFu)));
    return hn::IfThenElse(hn::RebindMask(d, hn::IsNaN(v)), hn::Set(d, 0x7FC00000u), sum);
  }
  static float get(const void* x, std::int64_t i) { return to_float(static_cast<const Bf16*>(x)[i]); }
  static void set(float v, void* x, std::int64_t i) { static_cast<Bf16*>(x)[i] = to_bf16(v); }
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
    // Four sums, since each waits for its last addition.
    Vec squares = hn::Zero(Floats()), squares1 = squares, squares2 = squares, squares3 = squares;
    std::int64_t i = 0;
    for (; i + 4 * lanes() <= n; i += 4 * lanes()) {
      const Vec v0 = t.load(x, i), v1 = t.load(x, i + lanes());
      const Vec v2 = t.load(x, i + 2 * lanes()), v3 = t.load(x, i + 3 * lanes());
      squares = hn::MulAdd(v0, v0, squares);
      squares1 = hn::MulAdd(v1, v1, squares1);
      squares2 = hn::MulAdd(v2, v2, squares2);
      squares3 = hn::MulAdd(v3, v3, squares3);
    }
    for (; i + lanes() <= n; i += lanes()) {
      const Vec v = t.load(x, i);
      squares = hn::MulAdd(v, v, squares);
    }
    squares = hn::Add(hn::Add(squares, squares1), hn::Add(squares2, squares3));
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
    const auto gated = [&](Vec g, Vec u) HWY_ATTR {
      return hn::Mul(hn::Div(g, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(g), limit)))), u);
    };
    std::int64_t i = 0;
    for (; i + lanes() <= n; i += lanes()) t.store(gated(t.load(gate, i), t.load(up, i)), out, i);
    if (i == n) return;
    // The rest by the same instructions: an element's bits do not depend on where a row is cut.
    HWY_ALIGN float rest[2][hn::MaxLanes(Floats())] = {};
    for (std::int64_t k = 0; i + k < n; ++k) {
      rest[0][k] = t.get(gate, i + k);
      rest[1][k] = t.get(up, i + k);
    }
    hn::Store(gated(hn::Load(d, rest[0]), hn::Load(d, rest[1])), d, rest[0]);
    for (std::int64_t k = 0; i + k < n; ++k) t.set(rest[0][k], out, i + k);
  });
}

void Rotate(void* x, const float* cosines, const float* sines, DType dtype, std::int64_t pairs) {
  with_type(dtype, [&](auto t) HWY_ATTR {
    const Floats d;
    std::int64_t i = 0;
    for (; i + lanes() <= pairs; i += lanes()) {
      Vec a, b;
      t.load_pairs(x, i, a, b);
      const Vec cosine = hn::LoadU(d, cosines + i), sine = hn::LoadU(d, sines + i);
      t.store_pairs(hn::NegMulAdd(b, sine, hn::Mul(a, cosine)), hn::MulAdd(a, sine, hn::Mul(b, cosine)), x,
                    i);
    }
    for (; i < pairs; ++i) {
      const float a = t.get(x, 2 * i), b = t.get(x, 2 * i + 1);
      t.set(a * cosines[i] - b * sines[i], x, 2 * i);
      t.set(b * cosines[i] + a * sines[i], x, 2 * i + 1);
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

extern const Table kTable;
const Table kTable = {Widen, Narrow, RmsNorm, SiluMul, Rotate, Max, ExpSum, Scale, AddScaled};

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu::rows
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu::rows {
namespace {

// Highway's own dispatch would need its library at run time; its headers are enough for this. The machine is
// asked once, by the backend whose kernels run beside these.
const Table& table() {
  static const Table& chosen = []() -> const Table& {
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

void widen(const void* x, DType dtype, float* out, std::int64_t n) { table().widen(x, dtype, out, n); }
void narrow(const float* x, void* out, DType dtype, std::int64_t n) { table().narrow(x, out, dtype, n); }
void rms_norm(const void* x, const float* weight, float eps, void* out, DType dtype, std::int64_t n) {
  table().rms_norm(x, weight, eps, out, dtype, n);
}
void silu_mul(const void* gate, const void* up, void* out, DType dtype, std::int64_t n) {
  table().silu_mul(gate, up, out, dtype, n);
}
void rotate(void* x, const float* cosines, const float* sines, DType dtype, std::int64_t pairs) {
  table().rotate(x, cosines, sines, dtype, pairs);
}
float max(const float* x, std::int64_t n) { return table().max(x, n); }
float exp_sum(const float* x, float scale, float shift, void* p, DType dtype, std::int64_t n) {
  return table().exp_sum(x, scale, shift, p, dtype, n);
}
void scale(float* x, float factor, std::int64_t n) { table().scale(x, factor, n); }
void add_scaled(const float* x, float factor, float* y, std::int64_t n) {
  table().add_scaled(x, factor, y, n);
}

}  // namespace flash_mla::cpu::rows
#endif  // HWY_ONCE
