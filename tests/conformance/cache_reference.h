#pragma once

// What the tests of the cache operations share: the bytes of every format, written from the definition of each without
// the library's quantisers, and tokens to append.

#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>

#include "base/element.h"
#include "flash_mla/kv_cache.h"
#include "guarded.h"

namespace flash_mla::conformance {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The value of an e4m3, from its definition.
inline float value_of(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
  if ((bits & 0x7F) == 0x7F) return kNan;
  const double x =
      exponent == 0 ? mantissa * std::pow(2.0, -9) : (8 + mantissa) * std::pow(2.0, exponent - 10);
  return static_cast<float>((bits & 0x80) != 0 ? -x : x);
}

// The nearest e4m3 by search: ties to the even code, beyond 448 to 448.
inline std::uint8_t nearest(float x) {
  if (std::isnan(x)) return 0x7F;
  static const std::vector<double> numbers = [] {
    std::vector<double> all;
    all.reserve(0x7F);
    for (int code = 0; code < 0x7F; ++code) all.push_back(value_of(static_cast<std::uint8_t>(code)));
    return all;
  }();
  const double magnitude = std::min(std::abs(static_cast<double>(x)), 448.0);
  auto code =
      std::lower_bound(numbers.begin(), numbers.end(), magnitude) - numbers.begin();  // the first above it
  if (code > 0) {
    const double down = magnitude - numbers[static_cast<std::size_t>(code) - 1];
    const double up = numbers[static_cast<std::size_t>(code)] - magnitude;
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(code | (std::signbit(x) ? 0x80 : 0));
}

inline float power_of_two_from(float x) {
  int exponent = 0;
  const float mantissa = std::frexp(x, &exponent);  // x = mantissa * 2^exponent, 0.5 <= mantissa < 1
  return std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
}

inline float scale_of(Fp8Recipe recipe, float amax) {
  switch (recipe) {
    case Fp8Recipe::kFlashMla:
      return power_of_two_from(std::max(amax / 448, 1e-4f));
    case Fp8Recipe::kVllm:
      return std::max(amax / 448, FLT_MIN);
    case Fp8Recipe::kSglang:
      return amax / 448;
    case Fp8Recipe::kIndexerPow2:
      return power_of_two_from(std::max(amax, 1e-4f) / 448);
    case Fp8Recipe::kIndexer:
      return std::max(amax, 1e-4f) / 448;
    case Fp8Recipe::kVllmIndexer:
      return power_of_two_from(std::max(amax, 1e-10f) / 448);
  }
  return 0;
}

/// A tile as the recipe has it: scale, and one byte per element.
inline float quantise(Fp8Recipe recipe, const float* x, int n, std::uint8_t* bytes) {
  float amax = 0;
  for (int i = 0; i < n; ++i) {
    if (std::abs(x[i]) > amax) amax = std::abs(x[i]);
  }
  const float scale = scale_of(recipe, amax);
  for (int i = 0; i < n; ++i) {
    const float y = recipe == Fp8Recipe::kSglang ? (amax == 0 ? x[i] : x[i] * (1 / scale)) : x[i] / scale;
    bytes[i] = nearest(y);
  }
  return scale;
}

/// Where the bytes of a token are expected, page by page as kv_cache.h tells it.
inline std::map<std::size_t, std::uint8_t> expected_bytes(const KvAppendArgs& a, const float* row,
                                                          std::int64_t slot) {
  const std::int64_t page_size = a.cache.data.size(1), page = slot / page_size, offset = slot % page_size;
  const std::int64_t in_page = offset * a.cache.data.stride(1);  // not of kFp8V4
  const bool fp8 = a.cache.data.dtype == DType::kUInt8;
  const std::int64_t first = page * a.cache.data.stride(0) * (fp8 ? 1 : 2);
  std::map<std::size_t, std::uint8_t> bytes;
  const auto put = [&](std::int64_t at, const void* from, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i)
      bytes[static_cast<std::size_t>(at) + i] = static_cast<const std::uint8_t*>(from)[i];
  };
  const auto halves = [&](std::int64_t at, const float* x, int n) {
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      const std::uint16_t bits =
          a.cache.format == KvFormat::kFloat16 ? to_fp16(x[i]).bits : to_bf16(x[i]).bits;
      put(at + 2 * i, &bits, 2);
    }
  };
  std::uint8_t e4m3[576];
  if (a.cache.format == KvFormat::kFp8V32) {
    const std::int64_t at = first + in_page;
    for (std::ptrdiff_t t = 0; t < 4; ++t) {
      const float scale = quantise(a.recipe, row + t * 128, 128, e4m3 + t * 128);
      put(at + 512 + 4 * t, &scale, 4);
    }
    put(at, e4m3, 512);
    halves(at + 528, row + 512, 64);
  } else if (a.cache.format == KvFormat::kFp8V4) {
    const std::int64_t at = first + offset * 576, scales = first + page_size * 576 + offset * 8;
    for (std::ptrdiff_t t = 0; t < 7; ++t) {
      const float scale = quantise(Fp8Recipe::kFlashMla, row + t * 64, 64, e4m3 + t * 64);
      const auto byte = static_cast<std::uint8_t>(std::ilogb(scale) + 127);
      put(scales + t, &byte, 1);
    }
    const std::uint8_t pad = 0;
    put(scales + 7, &pad, 1);
    put(at, e4m3, 448);
    halves(at + 448, row + 448, 64);
  } else if (a.cache.format == KvFormat::kFp8Tensor) {
    for (int i = 0; i < 576; ++i) e4m3[i] = nearest(row[i] / a.cache.scale);
    put(first + in_page, e4m3, 576);
  } else {
    const int d = static_cast<int>(a.cache.data.size(3));
    halves(first + in_page * 2, row, d);
  }
  return bytes;
}

/// Tokens to append, in a float format; values chosen to meet ties, subnormals, zero tiles and NaN.
struct Tokens {
  Tokens(int n, int latent_width, DType type, unsigned seed) : count(n), width(latent_width), dtype(type) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < n; ++i) {
      const float size = std::array{1.0f, 1e-6f, 0.0f, 300.0f, 1e-3f}[static_cast<std::size_t>(i % 5)];
      for (int d = 0; d < width + 64; ++d) {
        float x = normal(rng) * size;
        if (i % 7 == 3 && d % 64 < 32) x = std::ldexp(std::round(x * 4), -3);  // ties
        if (i % 7 == 5 && d == 5) x = kNan;
        add(x, d < width ? latent : rope);
      }
    }
  }
  void add(float x, std::vector<std::uint8_t>& to) {
    visit_float_type(dtype, [&](auto element) {
      const auto value = from_double<decltype(element)>(x);
      const auto* raw = reinterpret_cast<const std::uint8_t*>(&value);
      to.insert(to.end(), raw, raw + sizeof(value));
    });
  }
  /// Token i, latent and rope, as it was rounded to `dtype`.
  std::vector<float> row(int i) const {
    std::vector<float> x;
    visit_float_type(dtype, [&](auto element) {
      decltype(element) value;
      const auto take = [&](const std::vector<std::uint8_t>& from, int n) {
        for (int d = 0; d < n; ++d) {
          std::memcpy(&value, &from[static_cast<std::size_t>(i * n + d) * sizeof(value)], sizeof(value));
          x.push_back(static_cast<float>(to_float(value)));
        }
      };
      take(latent, width);
      take(rope, 64);
    });
    return x;
  }
  int count, width;
  DType dtype;
  std::vector<std::uint8_t> latent, rope;
};

/// Tests of the cache operations on a backend.
class CacheTest : public ::testing::TestWithParam<std::shared_ptr<BackendUnderTest>> {
 protected:
  BackendUnderTest& backend() { return *GetParam(); }

  /// Memory of the backend with a copy of `bytes`; the view moves there.
  std::unique_ptr<Guarded> upload(TensorView& v, const void* from, std::size_t bytes) {
    auto memory = std::make_unique<Guarded>(backend(), bytes);
    memory->upload(from);
    v.data = memory->data();
    v.device = backend().device();
    return memory;
  }
};

}  // namespace flash_mla::conformance
