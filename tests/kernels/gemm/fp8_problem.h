#pragma once

// Products in FP8 on random codes and scales, and what they mean in float64. What no product may read is NaN.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "base/fp8.h"
#include "kernels/gemm/sm90/fp8_gemm.h"

namespace flash_mla::fp8_test {

inline float value_of(std::uint8_t code) {
  static const std::array<float, 256> kValues = [] {
    std::array<float, 256> values{};
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = to_float(E4m3{static_cast<std::uint8_t>(i)});
    return values;
  }();
  return kValues[code];
}

struct Shape {
  int n = 256, k = 256;
  std::vector<int> rows = {128};  ///< of every matrix
  bool blocks = false;            ///< scales of 128 rows are alike
  /// Rows are gathered and the results activated and quantised; rows are scattered.
  bool silu = false, scatter = false;
  bool fp32 = false, accumulate = false;
  int divisor = 1, group = 16;
  bool turns = false;
  unsigned seed = 1;
};

struct Problem {
  explicit Problem(Shape shape)
      : s(std::move(shape)),
        rng(s.seed),
        experts(static_cast<int>(s.rows.size())),
        m(std::accumulate(s.rows.begin(), s.rows.end(), 0)),
        x_rows(s.silu ? (m + s.divisor - 1) / s.divisor : m),
        width((s.k + 127) / 128),
        x_stride(s.k + 32),
        scale_rows((s.n + 7) / 8),
        pairs(static_cast<std::size_t>(m)),
        x(codes(x_rows, s.k, x_stride)),
        weight(codes(std::int64_t{experts} * s.n, s.k, s.k)),
        x_scales(scales(std::int64_t{x_rows} * width)),
        weight_scales(scales(std::int64_t{experts} * scale_rows * width)) {
    std::iota(pairs.begin(), pairs.end(), 0);
    std::shuffle(pairs.begin(), pairs.end(), rng);
    if (s.blocks) {
      const int half = s.silu ? s.n / 16 : scale_rows;  // [gate; up]
      for (int e = 0; e < experts; ++e) {
        for (int r = 0; r < scale_rows; ++r) {
          const int first = r / half * half + r % half / 16 * 16;
          for (int c = 0; c < width; ++c) scale(e, r, c) = scale(e, first, c);
        }
      }
    }
    constexpr int kMost = 128;
    for (int e = 0, first = 0; e < experts; ++e) {
      const int count = s.rows[static_cast<std::size_t>(e)];
      for (int u = 0; u < count; u += kMost) units.push_back({e, first + u, std::min(kMost, count - u)});
      expert_of.insert(expert_of.end(), static_cast<std::size_t>(count), e);
      first += count;
    }
  }

  int outputs() const { return s.silu ? s.n / 2 : s.n; }

  /// All but pointers.
  sm90::Fp8Gemm arguments(int columns) const {
    sm90::Fp8Gemm g;
    g.x_stride = x_stride;
    g.whole_blocks = s.blocks;
    g.m = m;
    g.n = s.n;
    g.k = s.k;
    g.experts = experts;
    g.x_rows = x_rows;
    g.max_units = static_cast<std::int64_t>(units.size());
    g.x_divisor = s.divisor;
    g.gather = g.silu_quantise = s.silu;
    g.scatter = s.scatter;
    g.out_fp32 = s.fp32;
    g.accumulate = s.accumulate;
    g.tiles = {columns, s.group, s.turns};
    return g;
  }

  /// Row `position` times row n of its expert's matrix.
  double product(int position, int n) {
    const int e = expert_of[static_cast<std::size_t>(position)];
    const int row = s.silu ? pairs[static_cast<std::size_t>(position)] / s.divisor : position;
    const std::uint8_t* const a = x.data() + std::int64_t{row} * x_stride;
    const std::uint8_t* const b = weight.data() + (std::int64_t{e} * s.n + n) * s.k;
    double sum = 0;
    for (int c = 0; c < width; ++c) {
      double part = 0;
      for (int k = 128 * c; k < std::min(s.k, 128 * c + 128); ++k) {
        part += double{value_of(a[k])} * double{value_of(b[k])};
      }
      sum += part * double{x_scales[static_cast<std::size_t>(std::int64_t{row} * width + c)]} *
             double{scale(e, n / 8, c)};
    }
    return sum;
  }

  float& scale(int e, int row, int column) {
    return weight_scales[static_cast<std::size_t>((std::int64_t{e} * scale_rows + row) * width + column)];
  }

  std::vector<std::uint8_t> codes(std::int64_t rows, int columns, int stride) {
    std::vector<std::uint8_t> out(static_cast<std::size_t>(rows * stride), 0x7F);  // NaN
    std::normal_distribution<float> normal;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        const float tail = rng() % 500 == 0 ? 20.0f : 1.0f;
        out[static_cast<std::size_t>(r * stride + c)] = to_e4m3(normal(rng) * 20 * tail).bits;
      }
    }
    return out;
  }
  std::vector<float> scales(std::int64_t count) {
    std::uniform_real_distribution<float> uniform(0.002f, 0.02f);
    std::vector<float> out(static_cast<std::size_t>(count));
    for (float& v : out) v = uniform(rng);
    return out;
  }

  Shape s;
  std::mt19937 rng;
  int experts, m, x_rows, width, x_stride, scale_rows;
  std::vector<std::int32_t> pairs;
  std::vector<std::uint8_t> x, weight;
  std::vector<float> x_scales, weight_scales;
  std::vector<sm90::ExpertUnit> units;
  std::vector<int> expert_of;
};

}  // namespace flash_mla::fp8_test
