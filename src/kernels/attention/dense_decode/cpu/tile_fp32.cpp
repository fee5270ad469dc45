// The tile kernel in fp32, for every instruction set Highway dispatches to. Keys of any dtype are widened to
// fp32 once per tile and serve both products from there.
//
// Register tile: kRowsPerStep x kVectors accumulators, 6 x 2 of the 16 registers of SSE4 and AVX2, 12 x 2 of
// the 32 of AVX-512; per step kVectors loads and kRowsPerStep broadcasts feed kRowsPerStep * kVectors FMAs.
// Tile of 64 tokens: 64 x 576 x 4 B = 147 KB of keys, beside 295 KB of queries and 262 KB of output (128
// heads), which together stay inside a 1 MB L2.

#include <algorithm>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "base/element.h"
#include "kernels/attention/dense_decode/cpu/tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/dense_decode/cpu/tile_fp32.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace flash_mla::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;
using I = hn::RebindToSigned<F>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(F()));
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
#if HWY_TARGET <= HWY_AVX3
constexpr int kRowsPerStep = 12;
#else
constexpr int kRowsPerStep = 6;
#endif
constexpr int kTileTokens = 64;

HWY_INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }

// 2^x for x <= 0: Taylor series of 2^f on |f| <= 1/2 to degree 6 (relative error below 1.3e-7) times the
// integer power through the exponent bits. Below 2^-126.5 the result is 0; -inf gives 0, NaN gives NaN.
HWY_INLINE V exp2_nonpositive(V x) {
  const F d;
  const I di;
  // Not Max, which loses NaN on some targets: a comparison with NaN is false and keeps it.
  const V lowest = hn::Set(d, -127.0f);
  x = hn::IfThenElse(hn::Lt(x, lowest), lowest, x);
  const V n = hn::Round(x);
  const V f = hn::Sub(x, n);
  V p = hn::Set(d, 1.5403530e-4f);
  p = hn::MulAdd(p, f, hn::Set(d, 1.3333558e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.6181291e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.5504109e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022651e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9314718e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  return hn::Mul(p, hn::BitCast(d, exponent));
}

HWY_INLINE void widen_row(const float* from, float* to, int n) {
  if (from == to) return;  // a key that was made in its place
  std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
}

HWY_INLINE V widen(const Bf16* from) {
  const F d;
  const hn::Rebind<hwy::bfloat16_t, F> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::bfloat16_t*>(from)));
}

// Where there is no instruction for it (below AVX2) Highway 1.0 takes the exponent of inf and NaN for 2^16,
// which no fp16 number has: those become inf and NaN again.
HWY_INLINE V widen(const Fp16* from) {
  const F d;
  const I di;
  const hn::Rebind<hwy::float16_t, F> dh;
  const V x = hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(from)));
#if HWY_TARGET >= HWY_SSE4
  const V magnitude = hn::Abs(x);
  const auto special =
      hn::And(hn::Ge(magnitude, hn::Set(d, 0x1p16f)), hn::Lt(magnitude, hn::Set(d, 0x1p17f)));
  const V widened = hn::BitCast(d, hn::Add(hn::BitCast(di, x), hn::Set(di, (255 - 143) << 23)));
  return hn::IfThenElse(special, widened, x);
#else
  (void)di;
  return x;
#endif
}

template <class Element>
HWY_INLINE void widen_row(const Element* from, float* to, int n) {
  const F d;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(widen(from + i), d, to + i);
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Rows of `width` in fp32, `ld` apart, zero from column `width` to ld.
template <class Element>
void widen_rows_of(const void* const* rows, float* kv, int count, int width, int ld) {
  for (int t = 0; t < count; ++t) {
    float* row = kv + static_cast<std::ptrdiff_t>(t) * ld;
    widen_row(static_cast<const Element*>(rows[t]), row, width);
    std::fill(row + width, row + ld, 0.0f);
  }
}

void widen_rows(DType dtype, const void* const* rows, float* kv, int count, int width, int ld) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen_rows_of<Bf16>(rows, kv, count, width, ld);
    case DType::kFloat16:
      return widen_rows_of<Fp16>(rows, kv, count, width, ld);
    default:
      return widen_rows_of<float>(rows, kv, count, width, ld);
  }
}

// S[t][row] for R tokens and W vectors of rows.
template <int R, int W>
HWY_INLINE void score_step(const float* HWY_RESTRICT keys, int ld, const float* HWY_RESTRICT q, int d_qk,
                           float* HWY_RESTRICT scores, int ld_scores, Prefetcher& prefetcher) {
  const F d;
  V acc[R][W];
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) acc[r][w] = hn::Zero(d);
  }
  for (int k = 0; k < d_qk; ++k) {
    prefetcher.next();
    V column[W];
    for (int w = 0; w < W; ++w) column[w] = hn::Load(d, q + (k * W + w) * kLanes);
    for (int r = 0; r < R; ++r) {
      const V key = hn::Set(d, keys[static_cast<std::ptrdiff_t>(r) * ld + k]);
      for (int w = 0; w < W; ++w) acc[r][w] = hn::MulAdd(key, column[w], acc[r][w]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) hn::Store(acc[r][w], d, scores + r * ld_scores + w * kLanes);
  }
}

// O[row][panel] = alpha[row] * O[row][panel] + sum_t P[t][row] * V[t][panel] for R rows.
template <int R>
HWY_INLINE void value_step(const float* HWY_RESTRICT values, int ld, const float* HWY_RESTRICT p, int ld_p,
                           int count, const float* HWY_RESTRICT alpha, bool first, float* HWY_RESTRICT out) {
  const F d;
  V acc[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < kVectors; ++w) {
      acc[r][w] =
          first ? hn::Zero(d) : hn::Mul(hn::Set(d, alpha[r]), hn::Load(d, out + r * kPanel + w * kLanes));
    }
  }
  for (int t = 0; t < count; ++t) {
    V value[kVectors];
    for (int w = 0; w < kVectors; ++w) {
      value[w] = hn::Load(d, values + static_cast<std::ptrdiff_t>(t) * ld + w * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const V weight = hn::Set(d, p[t * ld_p + r]);
      for (int w = 0; w < kVectors; ++w) acc[r][w] = hn::MulAdd(weight, value[w], acc[r][w]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < kVectors; ++w) hn::Store(acc[r][w], d, out + r * kPanel + w * kLanes);
  }
}

// Calls f.operator()<R>() for R = count, 1 <= count <= kRowsPerStep.
template <int R = kRowsPerStep, class Step>
HWY_INLINE void with_rows(int count, const Step& f) {
  if constexpr (R == 1) {
    f.template operator()<1>();
  } else {
    if (count == R) {
      f.template operator()<R>();
    } else {
      with_rows<R - 1>(count, f);
    }
  }
}

struct ScoreStep {
  const float* keys;
  int ld;
  const float* q;
  int d_qk;
  float* scores;
  int ld_scores;
  int vectors;
  Prefetcher& prefetcher;
  template <int R>
  void operator()() const {
    if (vectors == kVectors) {
      score_step<R, kVectors>(keys, ld, q, d_qk, scores, ld_scores, prefetcher);
    } else {
      score_step<R, 1>(keys, ld, q, d_qk, scores, ld_scores, prefetcher);
    }
  }
};

struct ValueStep {
  const float* values;
  int ld;
  const float* p;
  int ld_p;
  int count;
  const float* alpha;
  bool first;
  float* out;
  template <int R>
  void operator()() const {
    value_step<R>(values, ld, p, ld_p, count, alpha, first, out);
  }
};

// Running softmax down the columns of S, one vector of rows at a time; S becomes P.
void softmax(const TileProblem& problem, const TileScratch& s, int count, bool first, bool masked) {
  const F d;
  const I di;
  const V minus_inf = hn::Set(d, -std::numeric_limits<float>::infinity());
  const V scale = hn::Set(d, problem.scale_log2);
  const int ld = problem.rows_padded;
  for (int row = 0; row < ld; row += kLanes) {
    float* column = s.scores + row;
    V highest = minus_inf;
    const auto limit = hn::Load(di, s.limit + row);
    for (int t = 0; t < count; ++t) {
      V x = hn::Mul(hn::Load(d, column + t * ld), scale);
      if (masked) {
        const auto seen = hn::Lt(hn::Set(di, t), limit);
        x = hn::IfThenElse(hn::RebindMask(d, seen), x, minus_inf);
      }
      hn::Store(x, d, column + t * ld);
      highest = hn::Max(highest, x);
    }
    const V before = first ? minus_inf : hn::Load(d, s.row_max + row);
    highest = hn::Max(highest, before);
    // A row that has seen no key yet: subtract 0, so that -inf - -inf never arises.
    const V base = hn::IfThenElse(hn::Eq(highest, minus_inf), hn::Zero(d), highest);
    const V alpha = exp2_nonpositive(hn::Sub(before, base));
    V sum = first ? hn::Zero(d) : hn::Mul(alpha, hn::Load(d, s.row_sum + row));
    for (int t = 0; t < count; ++t) {
      const V p = exp2_nonpositive(hn::Sub(hn::Load(d, column + t * ld), base));
      hn::Store(p, d, column + t * ld);
      sum = hn::Add(sum, p);
    }
    hn::Store(highest, d, s.row_max + row);
    hn::Store(alpha, d, s.alpha + row);
    hn::Store(sum, d, s.row_sum + row);
  }
}

void attend(const TileProblem& problem, const TileScratch& s, int count, bool first, bool masked) {
  int ld = round_up(problem.d_qk, kPanel);
  auto* kv = reinterpret_cast<float*>(s.kv);
  widen_rows(problem.dtype, s.keys, kv, count, problem.d_qk, ld);
  const auto* q = reinterpret_cast<const float*>(s.q);
  const int rows = problem.rows_padded;
  Prefetcher prefetcher(problem, s);
  for (int row = 0; row < rows; row += kPanel) {
    const int vectors = std::min((rows - row) / kLanes, kVectors);
    for (int t = 0; t < count; t += kRowsPerStep) {
      with_rows(std::min(count - t, kRowsPerStep),
                ScoreStep{kv + static_cast<std::ptrdiff_t>(t) * ld, ld,
                          q + static_cast<std::ptrdiff_t>(row) * problem.d_qk, problem.d_qk,
                          s.scores + t * rows + row, rows, vectors, prefetcher});
    }
  }
  if (s.adjust != nullptr) s.adjust(s.adjust_context, problem, s, count);
  softmax(problem, s, count, first, masked);
  if (s.values != nullptr) {
    ld = round_up(problem.d_v, kPanel);
    widen_rows(problem.dtype, s.values, kv, count, problem.d_v, ld);
  }
  for (int c = 0; c < problem.d_v; c += kPanel) {
    float* out = s.out + static_cast<std::ptrdiff_t>(c) * rows;
    for (int row = 0; row < problem.rows; row += kRowsPerStep) {
      with_rows(std::min(problem.rows - row, kRowsPerStep),
                ValueStep{kv + c, ld, s.scores + row, rows, count, s.alpha + row, first, out + row * kPanel});
    }
  }
}

// Q in panels of kPanel rows (the last one may be one vector wide): (panels, d_qk, panel rows).
void pack_q(const TileProblem& problem, const void* const* q_rows, const TileScratch& s) {
  auto* q = reinterpret_cast<float*>(s.q);
  for (int row = 0; row < problem.rows_padded; row += kPanel) {
    const int width = std::min(problem.rows_padded - row, kPanel);
    float* panel = q + static_cast<std::ptrdiff_t>(row) * problem.d_qk;
    for (int r = 0; r < width; ++r) {
      if (row + r >= problem.rows) {
        for (int k = 0; k < problem.d_qk; ++k) panel[k * width + r] = 0.0f;
        continue;
      }
      visit_float_type(problem.dtype, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(q_rows[row + r]);
        for (int k = 0; k < problem.d_qk; ++k) {
          panel[k * width + r] = static_cast<float>(to_float(from[k]));
        }
      });
    }
  }
}

// Whether Highway's conversion from fp32 rounds to nearest and keeps inf and NaN. Version 1.0 does where
// there is an instruction for it (fp16 from AVX2 on) and truncates otherwise.
template <class Element>
constexpr bool kNarrowsWell = std::is_same_v<Element, Fp16>&& HWY_TARGET < HWY_SSE4;

template <class Element>
void store_row_as(const TileProblem& problem, const TileScratch& s, int row, float factor, Element* dst) {
  const F d;
  const V scale = hn::Set(d, factor);
  for (int c = 0; c < problem.d_v; c += kLanes) {
    const int panel = c / kPanel, column = c % kPanel;
    const V x = hn::Mul(
        scale, hn::Load(d, s.out + (static_cast<std::ptrdiff_t>(panel) * problem.rows_padded + row) * kPanel +
                               column));
    if (c + kLanes <= problem.d_v) {
      if constexpr (std::is_same_v<Element, float>) {
        hn::StoreU(x, d, dst + c);
      } else if constexpr (kNarrowsWell<Element>) {
        const hn::Rebind<hwy::float16_t, F> dh;
        hn::StoreU(hn::DemoteTo(dh, x), dh, reinterpret_cast<hwy::float16_t*>(dst + c));
      } else {
        HWY_ALIGN float lanes[kLanes];
        hn::Store(x, d, lanes);
        for (int i = 0; i < kLanes; ++i) dst[c + i] = from_double<Element>(lanes[i]);
      }
    } else {
      HWY_ALIGN float lanes[kLanes];
      hn::Store(x, d, lanes);
      for (int i = 0; c + i < problem.d_v; ++i) dst[c + i] = from_double<Element>(lanes[i]);
    }
  }
}

void store_row(const TileProblem& problem, const TileScratch& s, int row, float factor, DType dtype,
               void* dst) {
  switch (dtype) {
    case DType::kBFloat16:
      return store_row_as(problem, s, row, factor, static_cast<Bf16*>(dst));
    case DType::kFloat16:
      return store_row_as(problem, s, row, factor, static_cast<Fp16*>(dst));
    default:
      return store_row_as(problem, s, row, factor, static_cast<float*>(dst));
  }
}

const TileKernel* table() {
  static constexpr TileKernel kTable{kTileTokens, kLanes,  kPanel,    sizeof(float),
                                     &pack_q,     &attend, &store_row};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace flash_mla::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_mla::cpu {

// Highway's own dispatch (HWY_DYNAMIC_DISPATCH) would need its library at run time; its headers are enough
// for this.
const TileKernel& highway_tile_kernel(std::int64_t target) {
  switch (target) {
#if HWY_TARGETS & HWY_AVX3
    case HWY_AVX3:
      return *N_AVX3::table();
#endif
#if HWY_TARGETS & HWY_AVX2
    case HWY_AVX2:
      return *N_AVX2::table();
#endif
#if HWY_TARGETS & HWY_SSE4
    case HWY_SSE4:
      return *N_SSE4::table();
#endif
#if HWY_TARGETS & HWY_SSSE3
    case HWY_SSSE3:
      return *N_SSSE3::table();
#endif
    default:
      return *HWY_NAMESPACE::table();  // here that of HWY_STATIC_TARGET
  }
}

std::int64_t highway_targets() {
  std::int64_t targets = HWY_STATIC_TARGET;
#if HWY_ARCH_X86
  // What Highway compiles each target for. The library asks the operating system about the wide registers.
  __builtin_cpu_init();
  const auto has_bit = [](unsigned leaf, int bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(leaf, &a, &b, &c, &d) != 0 && (c >> bit & 1u) != 0;
  };
  constexpr unsigned kFeatures = 1, kExtendedFeatures = 0x80000001;
  const bool ssse3 = __builtin_cpu_supports("ssse3") != 0;
  const bool sse4 = ssse3 && __builtin_cpu_supports("sse4.1") != 0 && __builtin_cpu_supports("sse4.2") != 0 &&
                    has_bit(kFeatures, 1) && has_bit(kFeatures, 25);  // PCLMULQDQ, AES
  const bool avx2 = sse4 && __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
                    __builtin_cpu_supports("bmi") != 0 && __builtin_cpu_supports("bmi2") != 0 &&
                    has_bit(kFeatures, 29) && has_bit(kExtendedFeatures, 5);  // F16C, LZCNT
  const bool avx3 = avx2 && __builtin_cpu_supports("avx512f") != 0 &&
                    __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
                    __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512cd") != 0;
  targets |= (ssse3 ? HWY_SSSE3 : 0) | (sse4 ? HWY_SSE4 : 0) | (avx2 ? HWY_AVX2 : 0) | (avx3 ? HWY_AVX3 : 0);
#endif
  return targets & (HWY_TARGETS);
}

}  // namespace flash_mla::cpu
#endif
