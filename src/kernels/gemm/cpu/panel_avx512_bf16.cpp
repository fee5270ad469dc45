// Panels multiplied by dot products of bf16 pairs (VDPBF16PS).
//
//   plain   for each pair of depth: 4 vectors of 16 columns, a column's two values side by side
//   8 bits  the same order in bytes of sign and magnitude, but each 128-bit lane of 64 bytes holds 4
//   columns
//           of one vector in its first half and of the next in its second, as interleaving wants them
//   4 bits  the bytes of 8 bits, the second 32 of every 64 in the high halves of the first
//
// A magnitude of 7 bits, a whole number or e4m3's exponent and mantissa, is exact in bf16: its two bytes come out
// of tables of 128 (VPERMI2B), the sign is the byte's own. Ten instructions expand 128 weights, as many as three
// rows take to multiply them. 4 bits have tables of 16 (VPSHUFB).
//
// Register tile: 6 x 4 accumulators of 16 lanes; per pair 4 loads and 6 broadcasts feed 24 dot products.

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstring>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/gemm/cpu/panel.h"

// Everything below may use AVX-512; nothing above may, since other files share those definitions.
#if defined(__clang__)
#pragma clang attribute push(                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#endif

namespace flash_mla::cpu::panel {
namespace {

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kVectors = 4;
constexpr std::int64_t kRows = 6;
constexpr std::int64_t kFewRows = 4;
constexpr std::int64_t kPairBytes = kVectors * 64;        // plain
constexpr std::int64_t kPackedPairBytes = kVectors * 32;  // 8 bits
constexpr std::int64_t kHalfPairBytes = kVectors * 16;    // 4 bits
static_assert(kVectors * kLanes == kColumns);

inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

inline __m512i broadcast_pair(const std::byte* p) {
  std::int32_t x;
  std::memcpy(&x, p, sizeof(x));
  return _mm512_set1_epi32(x);
}

/// The bf16 values of all codes, their low and their high bytes.
template <std::size_t kSize>
struct Tables {
  alignas(64) std::array<std::uint8_t, kSize> low;
  alignas(64) std::array<std::uint8_t, kSize> high;
};

template <std::size_t kSize>
constexpr Tables<kSize> make_tables(auto value_of) {
  Tables<kSize> out{};
  for (std::size_t code = 0; code < kSize; ++code) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value_of(static_cast<std::uint8_t>(code)));
    out.low[code] = static_cast<std::uint8_t>(bits >> 16);
    out.high[code] = static_cast<std::uint8_t>(bits >> 24);
  }
  return out;
}
constexpr Tables<128> kInt8Tables =
    make_tables<128>([](std::uint8_t magnitude) { return static_cast<float>(magnitude); });
constexpr Tables<128> kE4m3Tables =
    make_tables<128>([](std::uint8_t magnitude) { return to_float(E4m3{magnitude}); });
constexpr Tables<16> kInt4Tables =
    make_tables<16>([](std::uint8_t code) { return static_cast<float>(code) - 8.0f; });

/// 64 packed weights of 8 bits to two vectors of bf16 pairs.
class ByteExpander {
 public:
  static constexpr std::int64_t kBytes = 64;

  explicit ByteExpander(const Tables<128>& tables)
      : low_{_mm512_load_si512(tables.low.data()), _mm512_load_si512(tables.low.data() + 64)},
        high_{_mm512_load_si512(tables.high.data()), _mm512_load_si512(tables.high.data() + 64)},
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

/// The same of 4 bits.
class NibbleExpander {
 public:
  static constexpr std::int64_t kBytes = 32;

  NibbleExpander()
      : low_(table(kInt4Tables.low.data())),
        high_(table(kInt4Tables.high.data())),
        mask_(_mm256_set1_epi8(15)) {}

  void operator()(const std::uint8_t* packed, __m512i& first, __m512i& second) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(bytes, mask_)),
                                             _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask_), 1);
    const __m512i low = _mm512_shuffle_epi8(low_, codes), high = _mm512_shuffle_epi8(high_, codes);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }

 private:
  static __m512i table(const std::uint8_t* at) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
  }
  __m512i low_, high_;
  __m256i mask_;
};

/// Where a pair of a column's depths lies among the bytes of all 64.
constexpr std::int64_t place(std::int64_t column) {
  const std::int64_t vector = column / kLanes;
  return vector / 2 * 64 + column % kLanes / 4 * 16 + vector % 2 * 8 + column % 4 * 2;
}

/// The two codes of a pair as they lie there.
inline std::uint16_t pair_at(const std::uint8_t* p) {
  std::uint16_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

void pack_nibbles(const std::uint8_t* values, std::int64_t stride, std::int64_t depth, std::uint8_t* out) {
  for (std::int64_t c = 0; c < kColumns; ++c) {
    const std::int64_t at = place(c);
    if (at % 64 >= 32) continue;  // the high halves' columns are 8 further on
    const std::uint8_t *low = values + c * stride, *high = low + 8 * stride;
    std::uint8_t* to = out + at / 64 * 32 + at % 64;
    for (std::int64_t k = 0; k < depth; k += 2, to += kHalfPairBytes) {
      const auto both = static_cast<std::uint16_t>(pair_at(low + k) | pair_at(high + k) << 4);
      std::memcpy(to, &both, sizeof(both));
    }
  }
}

void pack(Codes codes, const std::uint8_t* values, std::int64_t stride, std::int64_t depth, void* packed) {
  auto* out = static_cast<std::uint8_t*>(packed);
  if (codes == Codes::kInt4) return pack_nibbles(values, stride, depth, out);
  for (std::int64_t c = 0; c < kColumns; ++c) {
    std::uint8_t* to = out + place(c);
    for (std::int64_t k = 0; k < depth; k += 2, to += kPackedPairBytes) {
      std::memcpy(to, values + c * stride + k, 2);
    }
  }
  if (codes != Codes::kInt8) return;
  for (std::int64_t i = 0; i < depth * kColumns; ++i) {
    const auto negative = static_cast<std::uint8_t>(out[i] & 0x80);
    out[i] = negative != 0 ? static_cast<std::uint8_t>(0x80 | (0x100 - out[i])) : out[i];
  }
}

void pack_plain(const float* values, std::int64_t stride, std::int64_t depth, void* plain) {
  auto* out = static_cast<Bf16*>(plain);
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t c = 0; c < kColumns; ++c) {
      out[(k / 2 * kColumns + c) * 2 + k % 2] = to_bf16(values[c * stride + k]);
    }
  }
}

template <class Expander>
inline void expand_with(const Expander& expander, const void* packed, std::int64_t depth, void* plain) {
  const auto* in = static_cast<const std::uint8_t*>(packed);
  auto* out = static_cast<std::byte*>(plain);
  for (std::int64_t pair = 0; pair < depth / 2; ++pair) {
#pragma GCC unroll 2
    for (std::int64_t half = 2 * pair; half < 2 * pair + 2; ++half) {
      __m512i first, second;
      expander(in + half * Expander::kBytes, first, second);
      _mm512_store_si512(out + half * 128, first);
      _mm512_store_si512(out + half * 128 + 64, second);
    }
  }
}

void expand(Codes codes, const void* packed, std::int64_t depth, void* plain) {
  switch (codes) {
    case Codes::kInt8:
      return expand_with(ByteExpander(kInt8Tables), packed, depth, plain);
    case Codes::kE4m3:
      return expand_with(ByteExpander(kE4m3Tables), packed, depth, plain);
    case Codes::kInt4:
      return expand_with(NibbleExpander(), packed, depth, plain);
  }
}

/// The hardware reads ahead within a page of memory only.
constexpr std::ptrdiff_t kStreamDistance = 4096;

template <std::ptrdiff_t kBytes>
inline void fetch(const void* at) {
#pragma GCC unroll 4
  for (std::ptrdiff_t i = 0; i < kBytes; i += 64) {
    _mm_prefetch(static_cast<const char*>(at) + i, _MM_HINT_T0);
  }
}

/// The panel's vectors of one pair, from either.
struct FromPlain {
  const std::byte* panel;
  void operator()(std::int64_t pair, __m512i (&w)[kVectors]) const {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(panel + pair * kPairBytes + v * 64);
  }
};
/// For few rows, which wait for the weights.
struct FromStream {
  const std::byte* panel;
  void operator()(std::int64_t pair, __m512i (&w)[kVectors]) const {
    fetch<kPairBytes>(panel + pair * kPairBytes + kStreamDistance);
    FromPlain{panel}(pair, w);
  }
};
template <class Expander>
struct FromPacked {
  static constexpr std::int64_t kBytes = Expander::kBytes;
  const std::uint8_t* panel;
  Expander expander;
  void operator()(std::int64_t pair, __m512i (&w)[kVectors]) const {
    const std::uint8_t* at = panel + pair * 2 * kBytes;
    fetch<2 * kBytes>(at + kStreamDistance);
    expander(at, w[0], w[1]);
    expander(at + kBytes, w[2], w[3]);
  }
};

inline __m512 load_16(const std::byte* y, DType dtype, __mmask16 mask) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(mask, y);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, y)), 16));
}

inline void store_16(__m512 value, std::byte* y, DType dtype, __mmask16 mask) {
  if (dtype == DType::kFloat32) {
    _mm512_mask_storeu_ps(y, mask, value);
  } else {
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(value));
  }
}

/// The sums of R rows to y.
template <std::int64_t R>
inline void finish(const Block& b, const __m512 (&acc)[R][kVectors], std::int64_t row) {
#pragma GCC unroll 4
  for (std::int64_t v = 0; v < kVectors; ++v) {
    const std::int64_t left = b.columns - v * kLanes;
    if (left <= 0) break;
    const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1 << left) - 1);
    const __m512 scale =
        b.scale != nullptr ? _mm512_maskz_loadu_ps(mask, b.scale + v * kLanes) : _mm512_set1_ps(1);
    const __m512 bias =
        b.bias != nullptr ? _mm512_maskz_loadu_ps(mask, b.bias + v * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < R; ++r) {
      std::byte* y = b.y + (row + r) * b.y_stride +
                     v * kLanes * static_cast<std::ptrdiff_t>(b.y_dtype == DType::kFloat32 ? 4 : 2);
      __m512 value = _mm512_fmadd_ps(acc[r][v], scale, bias);
      if (b.accumulate) value = _mm512_add_ps(value, load_16(y, b.y_dtype, mask));
      store_16(value, y, b.y_dtype, mask);
    }
  }
}

/// `ahead`: with kAhead, a cache line for each pair that is fetched meanwhile.
template <std::int64_t R, class From, bool kAhead = false>
inline void multiply_rows(const Block& b, const From& from, std::int64_t row,
                          [[maybe_unused]] const std::byte* ahead = nullptr) {
  float* sums = b.sums + row * kColumns;
  __m512 acc[R][kVectors];
#pragma GCC unroll 8
  for (std::int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < kVectors; ++v) {
      acc[r][v] = b.first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kColumns + v * kLanes);
    }
  }
  const std::byte* x = b.x + row * b.x_stride;
  const std::ptrdiff_t stride = b.x_stride;
  const std::int64_t pairs = b.depth / 2;
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    __m512i w[kVectors];
    from(pair, w);
    if constexpr (kAhead) _mm_prefetch(reinterpret_cast<const char*>(ahead + pair * 64), _MM_HINT_T1);
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < R; ++r) {
      const __m512i value = broadcast_pair(x + r * stride + pair * 4);
#pragma GCC unroll 4
      for (std::int64_t v = 0; v < kVectors; ++v) acc[r][v] = dot(acc[r][v], w[v], value);
    }
  }
  if (b.last) return finish<R>(b, acc, row);
#pragma GCC unroll 8
  for (std::int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (std::int64_t v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + r * kColumns + v * kLanes, acc[r][v]);
  }
}

/// `count` rows from `row` on, at most R.
template <std::int64_t R, class From, bool kAhead = false>
inline void multiply_rest(const Block& b, const From& from, std::int64_t row, std::int64_t count,
                          const std::byte* ahead = nullptr) {
  if (count == R) return multiply_rows<R, From, kAhead>(b, from, row, ahead);
  if constexpr (R > 1) multiply_rest<R - 1, From, kAhead>(b, from, row, count, ahead);
}

void multiply(const Block& b, const void* plain) {
  const FromPlain from{static_cast<const std::byte*>(plain)};
  if (b.rows <= kFewRows) return multiply_rest<kFewRows>(b, FromStream{from.panel}, 0, b.rows);
  const std::byte* ahead = b.ahead;
  const std::byte* const end = b.ahead + b.ahead_bytes;
  for (std::int64_t row = 0; row < b.rows;) {
    // One or two rows alone would wait for their own sums: the last two steps share what is left.
    const std::int64_t left = b.rows - row;
    const std::int64_t count = left >= 2 * kRows ? kRows : left > kRows ? (left + 1) / 2 : left;
    if (ahead < end) {
      multiply_rest<kRows, FromPlain, true>(b, from, row, count, ahead);
      ahead += b.depth / 2 * 64;
    } else {
      multiply_rest<kRows>(b, from, row, count);
    }
    row += count;
  }
}

template <class Expander>
inline void multiply_with(const Expander& expander, const Block& b, const void* packed) {
  const FromPacked<Expander> from{static_cast<const std::uint8_t*>(packed), expander};
  multiply_rest<kFewRows>(b, from, 0, b.rows);
}

void multiply_packed(Codes codes, const Block& b, const void* packed) {
  switch (codes) {
    case Codes::kInt8:
      return multiply_with(ByteExpander(kInt8Tables), b, packed);
    case Codes::kE4m3:
      return multiply_with(ByteExpander(kE4m3Tables), b, packed);
    case Codes::kInt4:
      return multiply_with(NibbleExpander(), b, packed);
  }
}

constexpr Kernel kKernel = {2, 2, kFewRows, pack_plain, pack, expand, multiply, multiply_packed};

}  // namespace

const Kernel& avx512_bf16_kernel() { return kKernel; }

}  // namespace flash_mla::cpu::panel

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
