// Tile: 64 keys x dim, as pairs of bf16: pair p of key t is word t of row p (256 bytes). Four registers hold
// the 64 keys of a pair, 6 heads at a time keep 24 sums; a step is 4 loads, 6 broadcasts from memory and 24
// products of pairs. 28 of 32 registers are used.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/attention/dense_decode/cpu/transpose_words.h"
#include "kernels/attention/indexer/cpu/key_tile.h"

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

constexpr int kGroups = kTileKeys / 16;
constexpr int kHeads = 6;

/// The bf16 of every e4m3 magnitude. Each is exact: bf16 has more exponents and more digits.
struct E4m3Table {
  E4m3Table() {
    for (std::size_t code = 0; code < 128; ++code) {
      bits[code] = to_bf16(to_float(E4m3{static_cast<std::uint8_t>(code)})).bits;
    }
  }
  alignas(64) std::array<std::uint16_t, 128> bits;
};

const E4m3Table& e4m3_table() {
  static const E4m3Table kTable;
  return kTable;
}

/// 32 e4m3, one in the low byte of each half word, as bf16.
inline __m512i widen(__m512i codes, const std::uint16_t* table) {
  const __m512i low =
      _mm512_permutex2var_epi16(_mm512_load_si512(table), codes, _mm512_load_si512(table + 32));
  const __m512i high =
      _mm512_permutex2var_epi16(_mm512_load_si512(table + 64), codes, _mm512_load_si512(table + 96));
  const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
  return _mm512_or_si512(_mm512_mask_blend_epi16(upper, low, high), sign);
}

std::size_t tile_bytes(int dim) { return static_cast<std::size_t>(dim) * kTileKeys * 2; }

std::size_t query_bytes(int heads, int dim) {
  return (static_cast<std::size_t>(heads) * static_cast<std::size_t>(dim) * 2 + 63) / 64 * 64;
}

void pack_keys(const std::byte* const* keys, int n, IndexElement element, int dim, void* tile) {
  const E4m3Table& table = e4m3_table();
  auto* words = static_cast<std::uint32_t*>(tile);
  for (int group = 0; group < kGroups; ++group) {
    std::array<const std::byte*, 16> rows;
    for (std::size_t t = 0; t < 16; ++t) {
      const int key = group * 16 + static_cast<int>(t);
      rows[t] = keys[key < n ? key : 0];
    }
    const auto store = [&](int pair, __m512i pairs) {
      _mm512_store_si512(words + static_cast<std::ptrdiff_t>(pair) * kTileKeys + group * 16, pairs);
    };
    __m512i in[16], out[16];
    if (element == IndexElement::kBFloat16) {
      for (int at = 0; at < dim; at += 32) {
        const int left = std::min(dim - at, 32);
        const auto mask = static_cast<__mmask32>(left == 32 ? ~0u : (1u << left) - 1);
        for (std::size_t t = 0; t < 16; ++t) in[t] = _mm512_maskz_loadu_epi16(mask, rows[t] + 2 * at);
        transpose_words(in, out);
        for (int p = 0; p < left / 2; ++p) store(at / 2 + p, out[p]);
      }
      continue;
    }
    for (int at = 0; at < dim; at += 64) {
      const int left = std::min(dim - at, 64);
      const auto mask = left == 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      for (std::size_t t = 0; t < 16; ++t) in[t] = _mm512_maskz_loadu_epi8(mask, rows[t] + at);
      transpose_words(in, out);
      for (int q = 0; q < left / 4; ++q) {
        // Bytes 0 and 1 of each word to its half words, then 2 and 3.
        const __m512i even = _mm512_and_si512(out[q], _mm512_set1_epi16(0x00FF));
        const __m512i odd = _mm512_srli_epi16(out[q], 8);
        const __m512i first = _mm512_mask_blend_epi16(0xAAAAAAAAu, even, _mm512_slli_epi32(odd, 16));
        const __m512i second = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even, 16), odd);
        store(at / 2 + 2 * q, widen(first, table.bits.data()));
        store(at / 2 + 2 * q + 1, widen(second, table.bits.data()));
      }
    }
  }
}

void pack_query(const std::byte* query, IndexElement element, int heads, int dim, void* packed) {
  const std::size_t n = static_cast<std::size_t>(heads) * static_cast<std::size_t>(dim);
  if (element == IndexElement::kBFloat16) {
    std::memcpy(packed, query, n * 2);
    return;
  }
  auto* to = static_cast<Bf16*>(packed);
  for (std::size_t i = 0; i < n; ++i) to[i] = to_bf16(to_float(E4m3{static_cast<std::uint8_t>(query[i])}));
}

/// kCount heads from `query` on, added to the scores of the tile.
template <int kCount>
inline void score_heads(const std::uint32_t* tile, const std::uint32_t* query, const float* weights,
                        int pairs, __m512* scores) {
  __m512 sums[kCount][kGroups];
  for (int h = 0; h < kCount; ++h) {
    for (int g = 0; g < kGroups; ++g) sums[h][g] = _mm512_setzero_ps();
  }
  for (int p = 0; p < pairs; ++p) {
    __m512i keys[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      keys[g] = _mm512_load_si512(tile + static_cast<std::ptrdiff_t>(p) * kTileKeys + g * 16);
    }
    for (int h = 0; h < kCount; ++h) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(query[h * pairs + p]));
      for (int g = 0; g < kGroups; ++g) sums[h][g] = _mm512_dpbf16_ps(sums[h][g], (__m512bh)keys[g], pair);
    }
  }
  for (int h = 0; h < kCount; ++h) {
    const __m512 weight = _mm512_set1_ps(weights[h]);
    for (int g = 0; g < kGroups; ++g) {
      // The second operand is what a comparison with NaN gives: NaN stays.
      const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), sums[h][g]);
      scores[g] = _mm512_fmadd_ps(weight, positive, scores[g]);
    }
  }
}

void score(const void* tile, const void* query, const float* weights, int heads, int dim, float* out) {
  const auto* keys = static_cast<const std::uint32_t*>(tile);
  const auto* pairs_of = static_cast<const std::uint32_t*>(query);
  const int pairs = dim / 2;
  __m512 scores[kGroups];
  for (int g = 0; g < kGroups; ++g) scores[g] = _mm512_setzero_ps();
  int h = 0;
  for (; h + kHeads <= heads; h += kHeads) {
    score_heads<kHeads>(keys, pairs_of + static_cast<std::ptrdiff_t>(h) * pairs, weights + h, pairs, scores);
  }
  for (; h + 2 <= heads; h += 2) {
    score_heads<2>(keys, pairs_of + static_cast<std::ptrdiff_t>(h) * pairs, weights + h, pairs, scores);
  }
  for (; h < heads; ++h) {
    score_heads<1>(keys, pairs_of + static_cast<std::ptrdiff_t>(h) * pairs, weights + h, pairs, scores);
  }
  for (int g = 0; g < kGroups; ++g) _mm512_storeu_ps(out + g * 16, scores[g]);
}

}  // namespace

const IndexTileKernel& avx512_bf16_index_tile_kernel() {
  static constexpr IndexTileKernel kKernel{tile_bytes, query_bytes, pack_keys, pack_query, score};
  return kKernel;
}

}  // namespace flash_mla::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
