// Panels multiplied by dot products of bf16 pairs (VDPBF16PS).
//
//   expanded  for each pair of depth: 4 vectors of 16 columns, a column's two values side by side
//   packed    the same order in bytes of sign and magnitude, but each 128-bit lane of 64 bytes holds 4
//   columns
//             of one vector in its first half and of the next in its second, as interleaving wants them
//
// A magnitude of 7 bits is exact in bf16: its two bytes come out of tables of 128 (VPERMI2B), the sign is the
// byte's own. Ten instructions expand 128 weights, as many as three rows take to multiply them.
//
// Register tile: 6 x 4 accumulators of 16 lanes; per pair 4 loads and 6 broadcasts feed 24 dot products.

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstring>

#include "model/cpu_panel.h"

// Everything below may use AVX-512; nothing above may, since other files share those definitions.
#if defined(__clang__)
#pragma clang attribute push(                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#endif

namespace flash_mla::model::panel {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;
constexpr int kRows = 6;
constexpr int kFewRows = 4;
constexpr std::int64_t kPairBytes = kVectors * 64;        // expanded
constexpr std::int64_t kPackedPairBytes = kVectors * 32;  // packed
static_assert(kVectors * kLanes == kColumns);

inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

inline __m512i broadcast_pair(const std::byte* p) {
  std::int32_t x;
  std::memcpy(&x, p, sizeof(x));
  return _mm512_set1_epi32(x);
}

/// The bf16 values of all magnitudes, their low and their high bytes.
struct Tables {
  alignas(64) std::array<std::uint8_t, 128> low;
  alignas(64) std::array<std::uint8_t, 128> high;
};

constexpr Tables make_tables() {
  Tables out{};
  for (std::size_t m = 0; m < 128; ++m) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(static_cast<float>(m));
    out.low[m] = static_cast<std::uint8_t>(bits >> 16);
    out.high[m] = static_cast<std::uint8_t>(bits >> 24);
  }
  return out;
}
constexpr Tables kTables = make_tables();

/// 64 packed weights to two vectors of bf16 pairs.
class Expander {
 public:
  Expander()
      : low_{_mm512_load_si512(kTables.low.data()), _mm512_load_si512(kTables.low.data() + 64)},
        high_{_mm512_load_si512(kTables.high.data()), _mm512_load_si512(kTables.high.data() + 64)},
        sign_(_mm512_set1_epi8(static_cast<char>(0x80))) {}

  void operator()(const std::uint8_t* packed, __m512i& first, __m512i& second) const {
    const __m512i bytes = _mm512_loadu_si512(packed);
    const __m512i low = _mm512_permutex2var_epi8(low_[0], bytes, low_[1]);
    // high | (bytes & sign)
    const __m512i high =
        _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(high_[0], bytes, high_[1]), bytes, sign_, 0xF8);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }

 private:
  __m512i low_[2], high_[2], sign_;
};

void pack(const std::int8_t* values, std::int64_t stride, std::int64_t depth, std::uint8_t* packed) {
  const auto encode = [](std::int8_t v) {
    return static_cast<std::uint8_t>(v < 0 ? 0x80 | -static_cast<int>(v) : v);
  };
  for (std::int64_t k = 0; k < depth; ++k) {
    std::uint8_t* pair = packed + k / 2 * kPackedPairBytes;
    for (std::int64_t c = 0; c < kColumns; ++c) {
      const std::int64_t vector = c / kLanes, lane = c % kLanes / 4, column = c % 4;
      pair[vector / 2 * 64 + lane * 16 + vector % 2 * 8 + column * 2 + k % 2] =
          encode(values[c * stride + k]);
    }
  }
}

void expand(const std::uint8_t* packed, std::int64_t depth, void* expanded) {
  const Expander expander;
  auto* out = static_cast<std::byte*>(expanded);
  for (std::int64_t pair = 0; pair < depth / 2; ++pair) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i first, second;
      expander(packed + pair * kPackedPairBytes + half * 64, first, second);
      _mm512_store_si512(out + pair * kPairBytes + half * 128, first);
      _mm512_store_si512(out + pair * kPairBytes + half * 128 + 64, second);
    }
  }
}

/// The panel's vectors of one pair, from either form.
struct FromExpanded {
  const std::byte* panel;
  void operator()(std::int64_t pair, __m512i (&w)[kVectors]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(panel + pair * kPairBytes + v * 64);
  }
};
struct FromPacked {
  const std::uint8_t* panel;
  Expander expander;
  void operator()(std::int64_t pair, __m512i (&w)[kVectors]) const {
    expander(panel + pair * kPackedPairBytes, w[0], w[1]);
    expander(panel + pair * kPackedPairBytes + 64, w[2], w[3]);
  }
};

template <int R, class From>
inline void multiply_rows(const std::byte* x, std::ptrdiff_t stride, const From& from, std::int64_t depth,
                          float* sums, bool add) {
  __m512 acc[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = add ? _mm512_loadu_ps(sums + r * kColumns + v * kLanes) : _mm512_setzero_ps();
    }
  }
  for (std::int64_t pair = 0; pair < depth / 2; ++pair) {
    __m512i w[kVectors];
    from(pair, w);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i value = broadcast_pair(x + r * stride + pair * 4);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot(acc[r][v], w[v], value);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + r * kColumns + v * kLanes, acc[r][v]);
  }
}

/// `rows` of them, at most R.
template <int R, class From>
inline void multiply_some(std::int64_t rows, const std::byte* x, std::ptrdiff_t stride, const From& from,
                          std::int64_t depth, float* sums, bool add) {
  if (rows == R) return multiply_rows<R>(x, stride, from, depth, sums, add);
  if constexpr (R > 1) multiply_some<R - 1>(rows, x, stride, from, depth, sums, add);
}

void multiply(const std::byte* x, std::ptrdiff_t stride, std::int64_t rows, const void* expanded,
              std::int64_t depth, float* sums, bool add) {
  const FromExpanded from{static_cast<const std::byte*>(expanded)};
  std::int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_rows<kRows>(x + r * stride, stride, from, depth, sums + r * kColumns, add);
  }
  multiply_some<kRows - 1>(rows - r, x + r * stride, stride, from, depth, sums + r * kColumns, add);
}

void multiply_int8(const std::byte* x, std::ptrdiff_t stride, std::int64_t rows, const std::uint8_t* packed,
                   std::int64_t depth, float* sums, bool add) {
  multiply_some<kFewRows>(rows, x, stride, FromPacked{packed, {}}, depth, sums, add);
}

__m512 load(const void* y, DType dtype, int vector, __mmask16 mask) {
  if (dtype == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(y) + vector * kLanes);
  }
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(y) + vector * kLanes);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

void store(__m512 value, void* y, DType dtype, int vector, __mmask16 mask) {
  if (dtype == DType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + vector * kLanes, mask, value);
    return;
  }
  _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(y) + vector * kLanes, mask,
                           (__m256i)_mm512_cvtneps_pbh(value));
}

void finish(const float* sums, const Finish& f, void* y) {
  for (int v = 0; v * kLanes < f.count; ++v) {
    const std::int64_t left = f.count - v * kLanes;
    const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1 << left) - 1);
    __m512 value =
        _mm512_mul_ps(_mm512_loadu_ps(sums + v * kLanes), _mm512_maskz_loadu_ps(mask, f.scale + v * kLanes));
    if (f.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, f.bias + v * kLanes));
    if (f.accumulate) value = _mm512_add_ps(value, load(y, f.dtype, v, mask));
    store(value, y, f.dtype, v, mask);
  }
}

constexpr Kernel kKernel = {2, 2, kFewRows, pack, expand, multiply, multiply_int8, finish};

}  // namespace

const Kernel& avx512_bf16_kernel() { return kKernel; }

}  // namespace flash_mla::model::panel

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
