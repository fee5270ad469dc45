// The tile kernel on AMX: both products by the matrix unit (TDPBF16PS: 16 x 16 sums over 16 pairs of bf16, 8,192
// multiply-adds in 16 clocks, where VDPBF16PS does 512 at most), the softmax between them on AVX-512.
//
//   scores  A = 16 keys x 16 pairs along d, from the cache as they lie there where their rows are equally far apart
//           (a page), else from a copy; B = 16 pairs x 16 rows of Q, as pack_q leaves them
//   output  A = 16 rows x 16 pairs of tokens of P, transposed by the softmax as it writes; B = 16 pairs of tokens x 16
//           columns of V, interleaved once per tile
//
// Tile registers: 0 to 3 sums (32 x 32), 4 and 5 A, 6 and 7 B; a step loads four KiB and does four products, 64 clocks.
// Tile of 128 tokens as tile_avx512_bf16.cpp has it, which also tells what lies where; P is (rows / 16, 64-byte rows of 16
// pairs of tokens, 16 rows), and the keys' copy is where the values come to lie after the scores.
//
// O is in memory between tiles, 256 KB of it at 128 heads: it is multiplied by alpha only where a maximum has changed.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/attention/dense_decode/cpu/bf16_pairs.h"
#include "kernels/attention/dense_decode/cpu/tile.h"
#include "kernels/attention/dense_decode/cpu/transpose_words.h"

// Everything below may use AVX-512 and AMX; nothing above may, since other files share those definitions.
#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#endif

namespace flash_mla::cpu {
namespace {

using namespace bf16_pairs;

constexpr int kTileTokens = 128;
constexpr int kSide = 16;  // rows of a tile register, and columns of sums
constexpr int kStepRows = 2 * kSide;
constexpr int kStepTokens = 2 * kSide;
constexpr int kStepElements = 2 * kSide;  // along d, or tokens of the second product
constexpr std::ptrdiff_t kTileRowBytes = 64;

/// What LDTILECFG reads: palette 1, all eight registers of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0;
  std::array<std::uint8_t, 14> reserved{};
  std::array<std::uint16_t, 16> row_bytes{64, 64, 64, 64, 64, 64, 64, 64};
  std::array<std::uint8_t, 16> rows{16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kConfig;

// GCC's loads of tiles do not tell the compiler that they read memory.
inline void written_is_there() { asm volatile("" ::: "memory"); }

/// 16 keys as the matrix unit reads them: a first row and the bytes from one to the next.
struct KeyRows {
  const std::byte* first;
  std::ptrdiff_t stride;
};

/// keys[0..16) if they are equally far apart, else copied to `copy`.
inline KeyRows key_rows(const void* const* keys, int d_qk, std::byte* copy) {
  const auto* first = static_cast<const std::byte*>(keys[0]);
  const std::ptrdiff_t stride = static_cast<const std::byte*>(keys[1]) - first;
  bool even = true;
  for (int t = 2; t < kSide; ++t) even &= static_cast<const std::byte*>(keys[t]) - first == t * stride;
  if (even) return {first, stride};
  const std::ptrdiff_t bytes = std::ptrdiff_t{2} * d_qk;
  for (int t = 0; t < kSide; ++t) {
    for (std::ptrdiff_t at = 0; at < bytes; at += kTileRowBytes) {
      _mm512_store_si512(copy + t * bytes + at,
                         _mm512_loadu_si512(static_cast<const std::byte*>(keys[t]) + at));
    }
  }
  return {copy, bytes};
}

/// S of 32 tokens and kWidth / 16 vectors of rows, whose queries are (d_qk / 2, kWidth) pairs.
template <int kWidth, bool kPrefetch>
inline void score_step(const KeyRows& low, const KeyRows& high, const std::byte* q, int d_qk, float* scores,
                       std::ptrdiff_t ld, Prefetcher& prefetcher) {
  constexpr std::ptrdiff_t kStride = std::ptrdiff_t{4} * kWidth;
  const std::ptrdiff_t ld_bytes = 4 * ld;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kWidth == kPanel) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::ptrdiff_t d = 0; d < d_qk; d += kStepElements) {
    if constexpr (kPrefetch) {
      for (int i = 0; i < kStepTokens; ++i) prefetcher.next();
    }
    const std::byte* column = q + d / 2 * kStride;
    _tile_loadd(4, low.first + 2 * d, low.stride);
    _tile_loadd(5, high.first + 2 * d, high.stride);
    _tile_loadd(6, column, kStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kWidth == kPanel) {
      _tile_loadd(7, column + kTileRowBytes, kStride);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, ld_bytes);
  _tile_stored(1, scores + kSide * ld, ld_bytes);
  if constexpr (kWidth == kPanel) {
    _tile_stored(2, scores + kSide, ld_bytes);
    _tile_stored(3, scores + kSide * ld + kSide, ld_bytes);
  }
}

// S for all rows. Rows are inside: 32 keys stay in L1 while the queries go by.
void score(const TileProblem& problem, const TileScratch& s, int count) {
  const std::ptrdiff_t ld = problem.rows_padded;
  const int d_qk = problem.d_qk;
  Prefetcher prefetcher(problem, s);
  for (std::ptrdiff_t t = 0; t < count; t += kStepTokens) {
    std::byte* const copy = s.kv + 2 * t * d_qk;
    const KeyRows low = key_rows(s.keys + t, d_qk, copy),
                  high = key_rows(s.keys + t + kSide, d_qk, copy + std::ptrdiff_t{2} * kSide * d_qk);
    written_is_there();
    const auto step = [&](std::ptrdiff_t row) {
      const std::byte* q = s.q + 2 * row * d_qk;
      float* scores = s.scores + t * ld + row;
      if (ld - row >= kPanel) {
        row == 0 ? score_step<kPanel, true>(low, high, q, d_qk, scores, ld, prefetcher)
                 : score_step<kPanel, false>(low, high, q, d_qk, scores, ld, prefetcher);
      } else {
        row == 0 ? score_step<kSide, true>(low, high, q, d_qk, scores, ld, prefetcher)
                 : score_step<kSide, false>(low, high, q, d_qk, scores, ld, prefetcher);
      }
    };
    for (std::ptrdiff_t row = 0; row < ld; row += kPanel) step(row);
  }
}

/// P of 16 rows on its way from the softmax, a token pair at a time, to blocks of 16 rows x 16 pairs.
class Weights {
 public:
  Weights(std::byte* p, int blocks) : p_(p), blocks_(blocks) {}

  void put(int row, int t, __m512i pairs) {
    const int pair = t / 2;
    pending_[pair % kSide] = pairs;
    if (pair % kSide == kSide - 1) write(row, pair / kSide);
  }
  /// The tokens past the last are zero.
  void end(int row, int count) {
    const int pairs = (count + 1) / 2;
    if (pairs % kSide == 0) return;
    for (int i = pairs % kSide; i < kSide; ++i) pending_[i] = _mm512_setzero_si512();
    write(row, pairs / kSide);
  }

 private:
  void write(int row, int block) {
    __m512i out[kSide];
    transpose_words(pending_, out);
    std::byte* to = p_ + (std::ptrdiff_t{row} / kSide * blocks_ + block) * kSide * kTileRowBytes;
    for (int i = 0; i < kSide; ++i) _mm512_store_si512(to + i * kTileRowBytes, out[i]);
  }

  std::byte* p_;
  int blocks_;
  __m512i pending_[kSide];
};

// O of 16 rows and a panel of columns by their alpha, if one of them is not 1.
inline void rescale(const float* alpha, float* out) {
  const __m512 factors = _mm512_load_ps(alpha);
  if (_mm512_cmp_ps_mask(factors, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
  for (std::ptrdiff_t r = 0; r < kSide; ++r) {
    const __m512 factor = _mm512_set1_ps(alpha[r]);
    for (std::ptrdiff_t v = 0; v < kVectors; ++v) {
      float* at = out + r * kPanel + v * kLanes;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
    }
  }
}

// O of kRows rows and a panel of columns. `p`: the rows' blocks of P, `ld_p` bytes from one 16 rows to the next.
template <int kRows>
inline void value_step(const std::byte* values, const std::byte* p, std::ptrdiff_t ld_p, int blocks,
                       const float* alpha, bool first, float* out) {
  constexpr std::ptrdiff_t kStride = std::ptrdiff_t{4} * kPanel;
  constexpr bool kBoth = kRows == kStepRows;
  float* const below = out + std::ptrdiff_t{kSide} * kPanel;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBoth) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    rescale(alpha, out);
    if constexpr (kBoth) rescale(alpha + kSide, below);
    written_is_there();
    _tile_loadd(0, out, kStride);
    _tile_loadd(1, out + kSide, kStride);
    if constexpr (kBoth) {
      _tile_loadd(2, below, kStride);
      _tile_loadd(3, below + kSide, kStride);
    }
  }
  for (std::ptrdiff_t block = 0; block < blocks; ++block) {
    const std::byte* rows = p + block * kSide * kTileRowBytes;
    const std::byte* value = values + block * kSide * kStride;
    _tile_loadd(4, rows, kTileRowBytes);
    _tile_loadd(6, value, kStride);
    _tile_loadd(7, value + kTileRowBytes, kStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
      _tile_loadd(5, rows + ld_p, kTileRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + kSide, kStride);
  if constexpr (kBoth) {
    _tile_stored(2, below, kStride);
    _tile_stored(3, below + kSide, kStride);
  }
}

void attend(const TileProblem& problem, const TileScratch& s, int count, bool first, bool masked) {
  const int rows = problem.rows_padded;
  // The last step of scores takes all its tokens whatever is left; the surplus is computed and ignored.
  for (int t = count; t % kStepTokens != 0; ++t) s.keys[t] = s.keys[count - 1];
  _tile_loadconfig(&kConfig);
  score(problem, s, count);
  if (s.adjust != nullptr) s.adjust(s.adjust_context, problem, s, count);
  const int blocks = (count + kStepTokens - 1) / kStepTokens;
  Weights weights(s.p, blocks);
  softmax(problem, s, count, first, masked, weights);
  interleave_values(problem, s, count, blocks * kSide);
  written_is_there();
  const std::ptrdiff_t ld_p = std::ptrdiff_t{blocks} * kSide * kTileRowBytes;
  for (int c = 0; c < problem.d_v; c += kPanel) {
    const std::byte* panel = s.kv + std::ptrdiff_t{c} * blocks * kSide * 4;
    float* out = s.out + static_cast<std::ptrdiff_t>(c) * rows;
    for (std::ptrdiff_t row = 0; row < rows; row += kStepRows) {
      const std::byte* p = s.p + row / kSide * ld_p;
      if (rows - row >= kStepRows) {
        value_step<kStepRows>(panel, p, ld_p, blocks, s.alpha + row, first, out + row * kPanel);
      } else {
        value_step<kSide>(panel, p, ld_p, blocks, s.alpha + row, first, out + row * kPanel);
      }
    }
  }
  _tile_release();
}

}  // namespace

const TileKernel& avx512_amx_tile_kernel() {
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
