#pragma once

// Products by weights of 16, 8 and 4 bits as src/kernels/gemm/sm90 takes them, and what they mean in float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/gemm/sm90/weight_stream.h"

namespace flash_mla::stream_test {

using sm90::StreamWeight;

/// `m` rows, or pairs of `experts` experts, of which the last has none.
struct Case {
  int m, n, k;
  int experts = 1;
  bool silu = false, fp32 = false, direct = false;
};

class Problem {
 public:
  /// `rounded`: weights with scales mean what they are in bfloat16.
  Problem(const Case& test_case, StreamWeight weight, int rows_per_unit, bool rounded = false)
      : c(test_case), weight_kind_(weight), random_(static_cast<unsigned>(c.m * 31 + c.n + c.k)) {
    make_weights();
    if (rounded) {
      for (double& w : meaning_) w = static_cast<double>(to_float(to_bf16(static_cast<float>(w))));
    }
    for (int i = 0; i < c.m * stride(); ++i) x_.push_back(to_bf16(uniform()).bits);
    for (int i = 0; i < c.m; ++i) expert_.push_back(c.experts == 1 ? 0 : draw(c.experts - 1));
    make_units(rows_per_unit);
  }
  Problem(const Problem&) = delete;

  int outputs() const { return c.silu ? c.n / 2 : c.n; }

  /// All but where results go. `units`: of one matrix too.
  sm90::WeightStream arguments(bool units) const {
    sm90::WeightStream p;
    p.weight = weight_.data();
    p.scales = scales_.empty() ? nullptr : scales_.data();
    p.weight_int4 = weight_kind_ == StreamWeight::kInt4;
    p.x = x_.data();
    p.x_stride = stride();
    p.out_stride = outputs();
    p.out_fp32 = c.fp32;
    p.silu_mul = c.silu;
    p.n = c.n;
    p.k = c.k;
    p.m = c.m;
    p.max_units = c.m;
    if (c.direct) {
      p.direct_ids = expert_.data();
    } else if (units || c.experts > 1) {
      p.units = units_.data();
      p.num_units = &num_units_;
      p.pairs = pairs_.data();
      p.max_units = num_units_;
    }
    return p;
  }

  /// Calls run(out) and compares.
  template <class F>
  void check(const F& run) const {
    const auto size = static_cast<std::size_t>(c.m * outputs());
    std::vector<float> wide(size, std::numeric_limits<float>::quiet_NaN());
    std::vector<std::uint16_t> narrow(size, to_bf16(std::numeric_limits<float>::quiet_NaN()).bits);
    run(c.fp32 ? static_cast<void*>(wide.data()) : narrow.data());
    for (int i = 0; i < c.m; ++i) {
      for (int n = 0; n < outputs(); ++n) {
        const auto at = static_cast<std::size_t>(i * outputs() + n);
        const float got = c.fp32 ? wide[at] : to_float(Bf16{narrow[at]});
        double want = product(i, n);
        if (c.silu) want = want / (1 + std::exp(-want)) * product(i, outputs() + n);
        const double bound = (c.fp32 ? 1e-5 : 1.0 / 256) * std::abs(want) + 1e-4;
        ASSERT_NEAR(static_cast<double>(got), want, bound) << "row " << i << " column " << n;
      }
    }
  }

  Case c;

 private:
  int stride() const { return c.k + 8; }
  int draw(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }
  float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random_); }
  double scale(std::int64_t at) const { return static_cast<double>(scales_[static_cast<std::size_t>(at)]); }

  void make_weights() {
    const auto count = static_cast<std::size_t>(std::int64_t{c.experts} * c.n * c.k);
    const int groups = (c.k + 127) / 128;
    const bool int4 = weight_kind_ == StreamWeight::kInt4;
    meaning_.resize(count);
    weight_.resize(weight_kind_ == StreamWeight::kBf16 ? 2 * count : int4 ? count / 2 : count);
    const std::int64_t scale_rows = int4 ? c.n : (c.n + 7) / 8;
    for (std::int64_t i = 0; weight_kind_ != StreamWeight::kBf16 && i < c.experts * scale_rows * groups; ++i)
      scales_.push_back(std::exp2(3 * uniform()) / (int4 ? 8 : 256));
    for (std::size_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::int64_t>(i);
      const std::int64_t row = at / c.k % c.n, column = at % c.k, e = at / c.k / c.n;
      if (int4) {
        const int code = draw(16), bit = 4 * sm90::int4_place(column);
        const std::int64_t word = e * c.n * c.k / 8 + sm90::int4_word(row, column, c.k);
        weight_[static_cast<std::size_t>(4 * word + bit / 8)] |= static_cast<std::uint8_t>(code << bit % 8);
        meaning_[i] = (code - 8) * scale((e * groups + column / 128) * c.n + row);
      } else if (weight_kind_ == StreamWeight::kE4m3) {
        const E4m3 code = to_e4m3(uniform() * 448);
        weight_[i] = code.bits;
        meaning_[i] =
            static_cast<double>(to_float(code)) * scale((e * scale_rows + row / 8) * groups + column / 128);
      } else {
        const Bf16 v = to_bf16(uniform());
        std::memcpy(weight_.data() + 2 * i, &v.bits, 2);
        meaning_[i] = static_cast<double>(to_float(v));
      }
    }
  }

  void make_units(int rows) {
    for (int e = 0; e < c.experts; ++e) {
      const auto first = static_cast<std::int32_t>(pairs_.size());
      for (int i = 0; i < c.m; ++i) {
        if (expert_[static_cast<std::size_t>(i)] == e) pairs_.push_back(i);
      }
      const auto end = static_cast<std::int32_t>(pairs_.size());
      for (std::int32_t u = first; u < end; u += rows) units_.push_back({e, u, std::min(rows, end - u)});
    }
    num_units_ = static_cast<std::int32_t>(units_.size());
  }

  double product(int row, int n) const {
    const auto expert = static_cast<std::int64_t>(expert_[static_cast<std::size_t>(row)]);
    double sum = 0;
    for (int i = 0; i < c.k; ++i) {
      const auto x = static_cast<double>(to_float(Bf16{x_[static_cast<std::size_t>(row * stride() + i)]}));
      sum += x * meaning_[static_cast<std::size_t>((expert * c.n + n) * c.k + i)];
    }
    return sum;
  }

  StreamWeight weight_kind_;
  std::mt19937 random_;
  std::vector<std::uint8_t> weight_;  // of new, which is aligned to 16
  std::vector<float> scales_;
  std::vector<double> meaning_;
  std::vector<std::uint16_t> x_;
  std::vector<std::int32_t> expert_, pairs_;
  std::vector<sm90::ExpertUnit> units_;
  std::int32_t num_units_ = 0;
};

}  // namespace flash_mla::stream_test
