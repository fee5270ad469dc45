// The tile kernel on AVX512_BF16: both products as dot products of bf16 pairs (VDPBF16PS), which doubles the
// FLOP per instruction over fp32 and reads the keys straight from the cache.
//
//   scores  pairs run along d: the 32-bit word K[t][d:d+2] is broadcast from the cache as it lies there
//   output  pairs run along tokens: V[t:t+2][c] is interleaved once per tile, P[t:t+2][row] is packed by the
//           softmax
//
// Register tile: 8 x 2 accumulators of 16 lanes; per step 2 loads and 8 broadcasts feed 16 dot products.
// Tile of 128 tokens: 131 KB of interleaved values, 147 KB of queries, 262 KB of output, 98 KB of S and P
// (128 heads): 640 KB of a 1 MB L2. The panel a step streams over (8 KB of V) stays in L1.

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/element.h"
#include "kernels/attention/dense_decode/cpu/tile.h"

// Everything below may use AVX-512; nothing above may, since other files share those definitions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace flash_mla::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kRowsPerStep = 8;           // output: rows
constexpr int kTokensPerStep = 8;         // scores: tokens beside two vectors of rows
constexpr int kTokensPerNarrowStep = 16;  // scores: tokens beside one
constexpr int kTileTokens = 128;

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

inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
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

// S[t][row] for the R tokens of keys and W vectors of rows.
template <int R, int W, bool kPrefetch>
inline void score_step(const void* const* keys, const __m512i* q, int pairs, float* scores, int ld,
                       Prefetcher& prefetcher) {
  __m512 acc[R][W];
  const char* key[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    key[r] = static_cast<const char*>(keys[r]);
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) acc[r][w] = _mm512_setzero_ps();
  }
  for (int k = 0; k < pairs; ++k) {
    if constexpr (kPrefetch) prefetcher.next();
    __m512i column[W];
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) column[w] = _mm512_load_si512(q + k * W + w);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i pair = _mm512_set1_epi32(load_pair(key[r] + 4 * static_cast<std::ptrdiff_t>(k)));
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) acc[r][w] = dot(acc[r][w], column[w], pair);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) _mm512_store_ps(scores + r * ld + w * kLanes, acc[r][w]);
  }
}

// O[row][panel] = alpha[row] * O[row][panel] + sum over token pairs of P[pair][row] * V[pair][panel], R rows.
template <int R>
inline void value_step(const __m512i* values, const std::int32_t* p, int ld_p, int pairs, const float* alpha,
                       bool first, float* out) {
  __m512 acc[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int w = 0; w < kVectors; ++w) {
      acc[r][w] =
          first ? _mm512_setzero_ps()
                : _mm512_mul_ps(_mm512_set1_ps(alpha[r]), _mm512_load_ps(out + r * kPanel + w * kLanes));
    }
  }
  for (int t = 0; t < pairs; ++t) {
    __m512i value[kVectors];
#pragma GCC unroll 16
    for (int w = 0; w < kVectors; ++w) value[w] = _mm512_load_si512(values + t * kVectors + w);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i weight = _mm512_set1_epi32(p[t * ld_p + r]);
#pragma GCC unroll 16
      for (int w = 0; w < kVectors; ++w) acc[r][w] = dot(acc[r][w], value[w], weight);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int w = 0; w < kVectors; ++w) _mm512_store_ps(out + r * kPanel + w * kLanes, acc[r][w]);
  }
}

template <int R = kRowsPerStep>
inline void value_steps(int rows, const __m512i* values, const std::int32_t* p, int ld_p, int pairs,
                        const float* alpha, bool first, float* out) {
  if (rows == R) return value_step<R>(values, p, ld_p, pairs, alpha, first, out);
  if constexpr (R > 1) value_steps<R - 1>(rows, values, p, ld_p, pairs, alpha, first, out);
}

// V in panels of kPanel columns of token pairs: (panels, pairs, kPanel, 2); columns past d_v are zero, and so
// is the partner of an odd last token.
void interleave_values(const TileProblem& problem, const TileScratch& s, int count) {
  const int pairs = (count + 1) / 2;
  const void* const* rows = s.values != nullptr ? s.values : s.keys;
  auto* values = reinterpret_cast<__m512i*>(s.kv);
  const auto tail = [](int columns) { return static_cast<__mmask16>((1u << columns) - 1u); };
  for (int t = 0; t < pairs; ++t) {
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
}

// Running softmax down the columns of S, 16 rows at a time; P goes out as bf16 pairs of tokens.
void softmax(const TileProblem& problem, const TileScratch& s, int count, bool first, bool masked) {
  const __m512 minus_inf = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 scale = _mm512_set1_ps(problem.scale_log2);
  const int ld = problem.rows_padded;
  auto* weights = reinterpret_cast<std::int32_t*>(s.p);
  for (int row = 0; row < ld; row += kLanes) {
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
      _mm512_store_si512(weights + t / 2 * ld + row,
                         interleave((__m256i)_mm512_cvtneps_pbh(low), (__m256i)_mm512_cvtneps_pbh(high)));
    }
    _mm512_store_ps(s.row_max + row, highest);
    _mm512_store_ps(s.alpha + row, alpha);
    _mm512_store_ps(s.row_sum + row, sum);
  }
}

// S for all tokens of the tile and one panel of rows.
template <bool kPrefetch>
void score_panel(const TileProblem& problem, const TileScratch& s, int count, int row,
                 Prefetcher& prefetcher) {
  const int ld = problem.rows_padded, pairs = problem.d_qk / 2;
  const __m512i* q =
      reinterpret_cast<const __m512i*>(s.q) + static_cast<std::ptrdiff_t>(row / kLanes) * pairs;
  float* scores = s.scores + row;
  if (ld - row >= kPanel) {
    for (int t = 0; t < count; t += kTokensPerStep) {
      score_step<kTokensPerStep, kVectors, kPrefetch>(s.keys + t, q, pairs, scores + t * ld, ld, prefetcher);
    }
  } else {
    for (int t = 0; t < count; t += kTokensPerNarrowStep) {
      score_step<kTokensPerNarrowStep, 1, kPrefetch>(s.keys + t, q, pairs, scores + t * ld, ld, prefetcher);
    }
  }
}

void attend(const TileProblem& problem, const TileScratch& s, int count, bool first, bool masked) {
  const int rows = problem.rows_padded;
  interleave_values(problem, s, count);
  // The last step of scores takes all its tokens whatever is left; the surplus is computed and ignored.
  for (int t = count; t % kTokensPerNarrowStep != 0; ++t) s.keys[t] = s.keys[count - 1];
  Prefetcher prefetcher(problem, s);
  score_panel<true>(problem, s, count, 0, prefetcher);
  for (int row = kPanel; row < rows; row += kPanel) score_panel<false>(problem, s, count, row, prefetcher);
  if (s.adjust != nullptr) s.adjust(s.adjust_context, problem, s, count);
  softmax(problem, s, count, first, masked);
  const int pairs = (count + 1) / 2;
  const auto* values = reinterpret_cast<const __m512i*>(s.kv);
  const auto* weights = reinterpret_cast<const std::int32_t*>(s.p);
  for (int c = 0; c < problem.d_v; c += kPanel) {
    const __m512i* panel = values + static_cast<std::ptrdiff_t>(c / kPanel) * pairs * kVectors;
    float* out = s.out + static_cast<std::ptrdiff_t>(c) * rows;
    for (int row = 0; row < problem.rows; row += kRowsPerStep) {
      value_steps(std::min(problem.rows - row, kRowsPerStep), panel, weights + row, rows, pairs,
                  s.alpha + row, first, out + row * kPanel);
    }
  }
}

// Q in panels of kPanel rows (the last one may be one vector wide) of pairs along d: (panels, d/2, rows, 2).
void pack_q(const TileProblem& problem, const void* const* q_rows, const TileScratch& s) {
  auto* q = reinterpret_cast<std::int32_t*>(s.q);
  const int d_pairs = problem.d_qk / 2;
  for (int row = 0; row < problem.rows_padded; row += kPanel) {
    const int width = std::min(problem.rows_padded - row, kPanel);
    std::int32_t* panel = q + static_cast<std::ptrdiff_t>(row) * d_pairs;
    for (int r = 0; r < width; ++r) {
      const auto* from = row + r < problem.rows ? static_cast<const char*>(q_rows[row + r]) : nullptr;
      for (int k = 0; k < d_pairs; ++k) panel[k * width + r] = from != nullptr ? load_pair(from + 4 * k) : 0;
    }
  }
}

void store_row(const TileProblem& problem, const TileScratch& s, int row, float factor, DType dtype,
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

}  // namespace

const TileKernel& avx512_bf16_tile_kernel() {
  static constexpr TileKernel kTable{kTileTokens, kLanes,  kPanel,    sizeof(std::uint16_t),
                                     &pack_q,     &attend, &store_row};
  return kTable;
}

}  // namespace flash_mla::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
