// Tokens of FP8 caches as rows of bfloat16, for the tile kernel on AVX512_BF16: 16 elements are a byte load
// with sign extension, a shift, a mask, a conversion from fp16, a product in fp32 and half a conversion to
// bf16 pairs.

#include <immintrin.h>

#include <cstring>

#include "base/fp8.h"
#include "kernels/cache/cpu/dequantise.h"

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

// 16 e4m3 as 2^-8 of their values: see E4m3Row in dequantise.cpp.
inline __m512 widen(__m256i words) {
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(static_cast<short>(0xBF80)));
  return _mm512_cvtph_ps(half);
}

// 32 e4m3 of one scale, to 32 bf16.
inline void convert(const std::byte* from, __m512 scale, Bf16* out) {
  const auto* bytes = reinterpret_cast<const __m128i*>(from);
  const __m512 low = _mm512_mul_ps(widen(_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes))), scale);
  const __m512 high = _mm512_mul_ps(widen(_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1))), scale);
  _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Whether one of n e4m3 is NaN; n is a multiple of 64.
inline bool has_nan(const std::byte* from, int n) {
  const __m512i magnitude = _mm512_set1_epi8(0x7F);
  __mmask64 found = 0;
  for (int i = 0; i < n; i += 64) {
    found |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(_mm512_loadu_si512(from + i), magnitude), magnitude);
  }
  return found != 0;
}

// A tile of n elements, a multiple of 64, element by element where vectors would be wrong.
inline void tile(const std::byte* from, int n, float scale, bool careful, Bf16* out) {
  if (careful || !(scale < 0x1p120f)) {
    for (int i = 0; i < n; ++i) {
      out[i] = to_bf16(to_float(E4m3{static_cast<std::uint8_t>(from[i])}) * scale);
    }
    return;
  }
  const __m512 scales = _mm512_set1_ps(scale * 256.0f);
  for (int i = 0; i < n; i += 32) convert(from + i, scales, out + i);
}

}  // namespace

void dequantise_avx512_bf16(const kv::Pool& pool, const kv::Token& token, Bf16* out) {
  switch (pool.format) {
    case KvFormat::kFp8V32: {
      const bool careful = has_nan(token.latent, kv::Fp8V32::kLatent);
      for (int t = 0; t < kv::Fp8V32::kScales; ++t) {
        float scale = 0;
        std::memcpy(&scale, token.scales + t * sizeof(scale), sizeof(scale));
        const int at = t * kv::Fp8V32::kTile;
        tile(token.latent + at, kv::Fp8V32::kTile, scale, careful, out + at);
      }
      break;
    }
    case KvFormat::kFp8V4: {
      const bool careful = has_nan(token.latent, kv::Fp8V4::kLatent);
      for (int t = 0; t < kv::Fp8V4::kScales; ++t) {
        const int at = t * kv::Fp8V4::kTile;
        tile(token.latent + at, kv::Fp8V4::kTile, to_float(E8m0{static_cast<std::uint8_t>(token.scales[t])}),
             careful, out + at);
      }
      break;
    }
    case KvFormat::kFp8Tensor:
      tile(token.latent, kv::Fp8Tensor::kTokenBytes, pool.scale,
           has_nan(token.latent, kv::Fp8Tensor::kTokenBytes), out);
      return;
    default:
      std::memcpy(out, token.latent, sizeof(Bf16) * static_cast<std::size_t>(pool.d_qk));
      return;
  }
  std::memcpy(out + pool.latent(), token.rope, sizeof(Bf16) * kv::kRopeWidth);
}

}  // namespace flash_mla::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
