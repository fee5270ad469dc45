#pragma once

#include <immintrin.h>

#include <cstddef>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

namespace flash_mla::cpu {

/// out[t][i] = in[i][t] for 16 words of 32 bits each.
inline void transpose_words(const __m512i* in, __m512i* out) {
  __m512i a[16], b[16];
  for (std::ptrdiff_t i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
  for (std::ptrdiff_t i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (std::ptrdiff_t i = 0; i < 4; ++i) {
    const __m512i x = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88),
                  y = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
    const __m512i z = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88),
                  w = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
    out[i] = _mm512_shuffle_i32x4(x, z, 0x88);
    out[i + 4] = _mm512_shuffle_i32x4(y, w, 0x88);
    out[i + 8] = _mm512_shuffle_i32x4(x, z, 0xDD);
    out[i + 12] = _mm512_shuffle_i32x4(y, w, 0xDD);
  }
}

}  // namespace flash_mla::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
