#pragma once

// Products by narrow weights on random codes and scales, and what they mean in float64. What no product may read is NaN.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/gemm/sm90/narrow_gemm.h"

namespace flash_mla::narrow_test {

struct Shape {
  int n = 256, k = 256;
  std::vector<int> rows = {16};  ///< of every matrix
  int rows_per_unit = 16;
  /// Rows are gathered and the results activated and quantised; rows are scattered.
  bool silu = false, scatter = false, fp32 = false;
  bool bf16 = false;  ///< x is bfloat16
  bool e4m3 = false;  ///< of the weights, with bf16
  int divisor = 1;
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
        pairs(static_cast<std::size_t>(m)),
        x(static_cast<std::size_t>(x_rows * width * 128)),
        wide(static_cast<std::size_t>(x_rows * stride()), 0x7FC0),  // NaN
        codes(static_cast<std::size_t>(std::int64_t{experts} * s.n * s.k)),
        words(codes.size() / 8) {
    std::iota(pairs.begin(), pairs.end(), 0);
    std::shuffle(pairs.begin(), pairs.end(), rng);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.002f, 0.02f);
    for (int r = 0; r < x_rows; ++r) {
      for (int b = 0; b < width; ++b) {
        double sum = 0;
        for (int c = 0; c < 128 && 128 * b + c < s.k; ++c) {
          const float tail = rng() % 300 == 0 ? 12.0f : 1.0f;
          const E4m3 code = to_e4m3((normal(rng) + 0.5f) * 20 * tail);
          x[static_cast<std::size_t>((r * width + b) * 128 + sm90::int4_order(c))] = code.bits;
          wide[static_cast<std::size_t>(r * stride() + 128 * b + c)] = to_bf16(normal(rng) * tail).bits;
          sum += static_cast<double>(to_float(code));
        }
        x_scales.push_back(uniform(rng));
        x_offsets.push_back(static_cast<float>(8 * sum * static_cast<double>(x_scales.back())));
      }
    }
    for (std::size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<std::uint8_t>(rng() % 16);
      const auto at = static_cast<std::int64_t>(i);
      const std::int64_t e = at / s.k / s.n, row = at / s.k % s.n, column = at % s.k;
      words[static_cast<std::size_t>(e * s.n * s.k / 8 + sm90::int4_word(row, column, s.k))] |=
          std::uint32_t{codes[i]} << (4 * sm90::int4_place(column));
    }
    if (s.e4m3) {
      for (std::uint8_t& code : codes) code = to_e4m3(normal(rng) * (rng() % 9 == 0 ? 0.01f : 20)).bits;
    }
    for (int i = 0; i < experts * width * (s.e4m3 ? (s.n + 7) / 8 : s.n); ++i)
      weight_scales.push_back(uniform(rng));
    for (int e = 0, first = 0; e < experts; ++e) {
      const int count = s.rows[static_cast<std::size_t>(e)];
      for (int u = 0; u < count; u += s.rows_per_unit)
        units.push_back({e, first + u, std::min(s.rows_per_unit, count - u)});
      expert_of.insert(expert_of.end(), static_cast<std::size_t>(count), e);
      first += count;
    }
  }

  int stride() const { return s.k + 8; }  // of `wide`
  int outputs() const { return s.silu ? s.n / 2 : s.n; }

  /// All but pointers.
  sm90::NarrowGemm arguments() const {
    sm90::NarrowGemm g;
    g.m = m;
    g.n = s.n;
    g.k = s.k;
    g.experts = experts;
    g.x_rows = x_rows;
    g.max_units = static_cast<std::int64_t>(units.size());
    g.rows_per_unit = s.rows_per_unit;
    g.x_divisor = s.divisor;
    g.gather = g.silu = s.silu;
    g.scatter = s.scatter;
    g.out_fp32 = s.fp32;
    g.bf16 = s.bf16;
    g.e4m3 = s.e4m3;
    g.x_stride = stride();
    return g;
  }

  /// Row `position` times row n of its expert's matrix, and what its rounding errors are measured by.
  struct Sum {
    double value, size;
  };
  Sum product(int position, int n) const {
    const int e = expert_of[static_cast<std::size_t>(position)];
    const int row = s.silu ? pairs[static_cast<std::size_t>(position)] / s.divisor : position;
    Sum sum{0, 0};
    for (int b = 0; b < width; ++b) {
      double part = 0, size = 0;
      for (int c = 0; c < 128 && 128 * b + c < s.k; ++c) {
        const std::size_t at = static_cast<std::size_t>((row * width + b) * 128 + sm90::int4_order(c));
        const std::uint8_t code =
            codes[static_cast<std::size_t>((std::int64_t{e} * s.n + n) * s.k + 128 * b + c)];
        const double weight = s.e4m3 ? static_cast<double>(to_float(E4m3{code})) : code - 8;
        const double value = s.bf16 ? static_cast<double>(to_float(
                                          Bf16{wide[static_cast<std::size_t>(row * stride() + 128 * b + c)]}))
                                    : static_cast<double>(to_float(E4m3{x[at]}));
        part += value * weight;
        size += std::abs(value) * (s.e4m3 ? std::abs(weight) : 8);
      }
      const double of_x =
          s.bf16 ? 1 : static_cast<double>(x_scales[static_cast<std::size_t>(row * width + b)]);
      const double scale =
          of_x * static_cast<double>(weight_scales[static_cast<std::size_t>(
                     s.e4m3 ? (e * ((s.n + 7) / 8) + n / 8) * width + b : (e * width + b) * s.n + n)]);
      sum.value += part * scale;
      sum.size += size * scale;
    }
    return sum;
  }

  Shape s;
  std::mt19937 rng;
  int experts, m, x_rows, width;
  std::vector<std::int32_t> pairs;
  std::vector<std::uint8_t> x;
  std::vector<std::uint16_t> wide;  // x in bfloat16
  std::vector<std::uint8_t> codes;
  std::vector<std::uint32_t> words;
  std::vector<float> x_scales, x_offsets, weight_scales;
  std::vector<sm90::ExpertUnit> units;
  std::vector<int> expert_of;
};

}  // namespace flash_mla::narrow_test
