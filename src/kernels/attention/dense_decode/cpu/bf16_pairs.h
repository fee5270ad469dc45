#pragma once

// What the tile kernels that multiply pairs of bf16 have in common: everything but the two products. For their two files
// alone: all of it is AVX-512.

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "flash_mla/tensor.h"
#include "kernels/attention/dense_decode/cpu/tile.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace flash_mla::cpu::bf16_pairs {

inline constexpr int kLanes = 16;
inline constexpr int kVectors = 2;
inline constexpr int kPanel = kVectors * kLanes;

inline __m512 exp2_nonpositive(__m512 x) {
  // Taylor series of 2^f on |f| <= 1/2 to degree 6, relative error below 1.3e-7. NaN gives NaN: the maximum
  // is its second operand when one is NaN.
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline std::int32_t load_pair(const void* p) {
  std::int32_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// 16 pairs (low, high) from two vectors of 16 bf16.
inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// V in panels of kPanel columns of token pairs: (panels, pairs, kPanel, 2); columns past d_v are zero, and so are tokens
// past `count`.
inline void interleave_values(const TileProblem& problem, const TileScratch& s, int count, int pairs) {
  const void* const* rows = s.values != nullptr ? s.values : s.keys;
  auto* values = reinterpret_cast<__m512i*>(s.kv);
  const auto tail = [](int columns) { return static_cast<__mmask16>((1u << columns) - 1u); };
  for (std::ptrdiff_t t = 0; 2 * t < count; ++t) {
    const auto* low = static_cast<const std::uint16_t*>(rows[2 * t]);
    const bool has_high = 2 * t + 1 < count;
    const auto* high = static_cast<const std::uint16_t*>(rows[has_high ? 2 * t + 1 : 2 * t]);
    for (int c = 0; c < problem.d_v; c += kLanes) {
      const int columns = std::min(problem.d_v - c, kLanes);
      const __mmask16 mask = columns == kLanes ? static_cast<__mmask16>(0xFFFF) : tail(columns);
      const __m256i a = _mm256_maskz_loadu_epi16(mask, low + c);
      const __m256i b = has_high ? _mm256_maskz_loadu_epi16(mask, high + c) : _mm256_setzero_si256();
      const int panel = c / kPanel, vector = c / kLanes % kVectors;
      _mm512_store_si512(values + (static_cast<std::ptrdiff_t>(panel) * pairs + t) * kVectors + vector,
                         interleave(a, b));
    }
    if ((problem.d_v + kLanes - 1) / kLanes % kVectors != 0) {
      const int panel = problem.d_v / kPanel;
      _mm512_store_si512(values + (static_cast<std::ptrdiff_t>(panel) * pairs + t) * kVectors + kVectors - 1,
                         _mm512_setzero_si512());
    }
  }
  const int panels = (problem.d_v + kPanel - 1) / kPanel;
  for (int panel = 0; panel < panels; ++panel) {
    for (int at = (count + 1) / 2 * kVectors; at < pairs * kVectors; ++at) {
      _mm512_store_si512(values + static_cast<std::ptrdiff_t>(panel) * pairs * kVectors + at,
                         _mm512_setzero_si512());
    }
  }
}

// Running softmax down the columns of S, 16 rows at a time. weights.put(row, t, pairs) takes P of tokens t and t + 1
// of the 16 rows from `row` on as bf16 pairs, of which P of a token past `count` is zero; weights.end(row, count) follows.
template <class Weights>
inline void softmax(const TileProblem& problem, const TileScratch& s, int count, bool first, bool masked,
                    Weights& weights) {
  const __m512 minus_inf = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 scale = _mm512_set1_ps(problem.scale_log2);
  const int rows = problem.rows_padded;
  const std::ptrdiff_t ld = rows;
  for (int row = 0; row < rows; row += kLanes) {
    float* column = s.scores + row;
    __m512 highest = minus_inf;
    const __m512i limit = _mm512_load_si512(s.limit + row);
    for (int t = 0; t < count; ++t) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(column + t * ld), scale);
      if (masked) {
        x = _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(_mm512_set1_epi32(t), limit), minus_inf, x);
      }
      _mm512_store_ps(column + t * ld, x);
      highest = _mm512_max_ps(highest, x);
    }
    const __m512 before = first ? minus_inf : _mm512_load_ps(s.row_max + row);
    highest = _mm512_max_ps(highest, before);
    // A row that has seen no key yet: subtract 0, so that -inf - -inf never arises.
    const __m512 base =
        _mm512_mask_blend_ps(_mm512_cmpeq_ps_mask(highest, minus_inf), highest, _mm512_setzero_ps());
    const __m512 alpha = exp2_nonpositive(_mm512_sub_ps(before, base));
    __m512 sum = first ? _mm512_setzero_ps() : _mm512_mul_ps(alpha, _mm512_load_ps(s.row_sum + row));
    for (int t = 0; t < count; t += 2) {
      const __m512 low = exp2_nonpositive(_mm512_sub_ps(_mm512_load_ps(column + t * ld), base));
      const __m512 high = t + 1 < count
                              ? exp2_nonpositive(_mm512_sub_ps(_mm512_load_ps(column + (t + 1) * ld), base))
                              : _mm512_setzero_ps();
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      weights.put(row, t, interleave((__m256i)_mm512_cvtneps_pbh(low), (__m256i)_mm512_cvtneps_pbh(high)));
    }
    weights.end(row, count);
    _mm512_store_ps(s.row_max + row, highest);
    _mm512_store_ps(s.alpha + row, alpha);
    _mm512_store_ps(s.row_sum + row, sum);
  }
}

// Q in panels of kPanel rows (the last one may be one vector wide) of pairs along d: (panels, d/2, rows, 2).
inline void pack_q(const TileProblem& problem, const void* const* q_rows, const TileScratch& s) {
  auto* q = reinterpret_cast<std::int32_t*>(s.q);
  const int d_pairs = problem.d_qk / 2;
  for (int row = 0; row < problem.rows_padded; row += kPanel) {
    const int width = std::min(problem.rows_padded - row, kPanel);
    std::int32_t* panel = q + static_cast<std::ptrdiff_t>(row) * d_pairs;
    for (int r = 0; r < width; ++r) {
      const auto* from = row + r < problem.rows ? static_cast<const char*>(q_rows[row + r]) : nullptr;
      for (std::ptrdiff_t k = 0; k < d_pairs; ++k)
        panel[k * width + r] = from != nullptr ? load_pair(from + 4 * k) : 0;
    }
  }
}

inline void store_row(const TileProblem& problem, const TileScratch& s, int row, float factor, DType dtype,
                      void* dst) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int c = 0; c < problem.d_v; c += kLanes) {
    const float* from =
        s.out + (static_cast<std::ptrdiff_t>(c / kPanel) * problem.rows_padded + row) * kPanel + c % kPanel;
    const __m512 x = _mm512_mul_ps(scale, _mm512_load_ps(from));
    const int columns = std::min(problem.d_v - c, kLanes);
    const auto mask = static_cast<__mmask16>(columns == kLanes ? 0xFFFFu : (1u << columns) - 1u);
    if (dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(dst) + c, mask, x);
    } else {
      _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(dst) + c, mask, (__m256i)_mm512_cvtneps_pbh(x));
    }
  }
}

}  // namespace flash_mla::cpu::bf16_pairs

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
