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

#include "kernels/attention/dense_decode/cpu/bf16_pairs.h"
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

using namespace bf16_pairs;

constexpr int kRowsPerStep = 8;           // output: rows
constexpr int kTokensPerStep = 8;         // scores: tokens beside two vectors of rows
constexpr int kTokensPerNarrowStep = 16;  // scores: tokens beside one
constexpr int kTileTokens = 128;

inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
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

/// P as (pairs of tokens, rows) pairs.
struct Weights {
  void put(int row, int t, __m512i p) const { _mm512_store_si512(pairs + t / 2 * rows + row, p); }
  void end(int, int) const {}

  std::int32_t* pairs;
  int rows;
};

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
  const int pairs = (count + 1) / 2;
  interleave_values(problem, s, count, pairs);
  // The last step of scores takes all its tokens whatever is left; the surplus is computed and ignored.
  for (int t = count; t % kTokensPerNarrowStep != 0; ++t) s.keys[t] = s.keys[count - 1];
  Prefetcher prefetcher(problem, s);
  score_panel<true>(problem, s, count, 0, prefetcher);
  for (int row = kPanel; row < rows; row += kPanel) score_panel<false>(problem, s, count, row, prefetcher);
  if (s.adjust != nullptr) s.adjust(s.adjust_context, problem, s, count);
  auto* const weights = reinterpret_cast<std::int32_t*>(s.p);
  Weights written{weights, rows};
  softmax(problem, s, count, first, masked, written);
  const auto* values = reinterpret_cast<const __m512i*>(s.kv);
  for (int c = 0; c < problem.d_v; c += kPanel) {
    const __m512i* panel = values + static_cast<std::ptrdiff_t>(c / kPanel) * pairs * kVectors;
    float* out = s.out + static_cast<std::ptrdiff_t>(c) * rows;
    for (int row = 0; row < problem.rows; row += kRowsPerStep) {
      value_steps(std::min(problem.rows - row, kRowsPerStep), panel, weights + row, rows, pairs,
                  s.alpha + row, first, out + row * kPanel);
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
