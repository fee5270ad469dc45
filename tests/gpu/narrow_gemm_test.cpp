// Products by narrow weights against what codes and scales mean in fp64, and against what was quantised.

#include "kernels/gemm/sm90/narrow_gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/element.h"
#include "experts.h"
#include "kernels/gemm/narrow_problem.h"
#include "kernels/quant/sm90/quantise_rows.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

using narrow_test::Problem;
using narrow_test::Shape;
using sm90::NarrowGemm;

/// A problem's data on the GPU.
struct OnGpu {
  explicit OnGpu(const Problem& problem)
      : x(problem.x),
        wide(problem.wide),
        words(problem.words),
        codes(problem.codes),
        x_scales(problem.x_scales),
        x_offsets(problem.x_offsets),
        weight_scales(problem.weight_scales),
        pairs(problem.pairs),
        units(problem.units),
        num_units(std::vector<std::int32_t>{static_cast<std::int32_t>(problem.units.size())}) {}

  NarrowGemm arguments(const Problem& problem) const {
    NarrowGemm g = problem.arguments();
    g.x = problem.s.bf16 ? static_cast<const void*>(wide.get()) : x.get();
    g.x_scales = x_scales.get();
    g.x_offsets = x_offsets.get();
    g.weight = problem.s.e4m3 ? static_cast<const void*>(codes.get()) : words.get();
    g.weight_scales = weight_scales.get();
    if (problem.experts > 1) {
      g.units = units.get();
      g.num_units = num_units.get();
    }
    if (problem.s.scatter || problem.s.silu) g.pairs = pairs.get();
    return g;
  }

  OnDevice<std::uint8_t> x;
  OnDevice<std::uint16_t> wide;
  OnDevice<std::uint32_t> words;
  OnDevice<std::uint8_t> codes;
  OnDevice<float> x_scales, x_offsets, weight_scales;
  OnDevice<std::int32_t> pairs;
  OnDevice<sm90::ExpertUnit> units;
  OnDevice<std::int32_t> num_units;
};

void run(const NarrowGemm& g) {
  ASSERT_TRUE(sm90::fits_narrow_gemm(g));
  check(sm90::narrow_gemm(g, nullptr), "narrow_gemm");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void check_products(const Shape& shape) {
  Problem problem(shape);
  const Shape& s = problem.s;
  const OnGpu data(problem);
  NarrowGemm g = data.arguments(problem);
  const int stride = s.n + 8;
  const std::size_t size = std::size_t(problem.m) * std::size_t(stride);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  OnDevice<float> wide(std::vector<float>(s.fp32 ? size : 1, nan));
  OnDevice<std::uint16_t> narrow(std::vector<std::uint16_t>(size, to_bf16(nan)));
  g.out = s.fp32 ? static_cast<void*>(wide.get()) : narrow.get();
  g.out_stride = stride;
  run(g);
  const std::vector<float> got_wide = wide.host();
  const std::vector<std::uint16_t> got_narrow = narrow.host();
  double error = 0, total = 0;
  for (int i = 0; i < problem.m; ++i) {
    const int row = s.scatter ? problem.pairs[std::size_t(i)] : i;
    for (int n = 0; n < stride; ++n) {
      const std::size_t at = std::size_t(row) * std::size_t(stride) + std::size_t(n);
      const float got = s.fp32 ? got_wide[at] : from_bf16(got_narrow[at]);
      if (n >= s.n) {
        ASSERT_TRUE(std::isnan(got)) << "padding of row " << row;
        continue;
      }
      const Problem::Sum want = problem.product(i, n);
      // Tensor cores keep some 14 bits of the sum of 128 products by codes, whose zero is 8.
      // Of bfloat16 all.
      const double bound = std::abs(want.value) / 200 + want.size * (s.bf16 ? 2e-6 : 5e-4);
      ASSERT_NEAR(double{got}, want.value, bound) << "row " << row << " column " << n;
      error += (double{got} - want.value) * (double{got} - want.value);
      total += want.value * want.value;
    }
  }
  EXPECT_LT(error / total, 5e-5);
}

TEST(NarrowGemm, OddSizes) {
  for (const int rows : {16, 32, 64, 128}) {
    check_products({.n = 264, .k = 400, .rows = {200}, .rows_per_unit = rows, .fp32 = true});
    check_products({.n = 8, .k = 16, .rows = {1}, .rows_per_unit = rows, .seed = 2});
    check_products({.n = 520, .k = 128, .rows = {65}, .rows_per_unit = rows, .seed = 3});
    check_products({.n = 776, .k = 2064, .rows = {300}, .rows_per_unit = rows, .seed = 4});
  }
}

TEST(NarrowGemm, Bf16) {
  for (const bool e4m3 : {false, true}) {
    for (const int rows : {16, 32, 64}) {
      Shape s{
          .n = 264, .k = 400, .rows = {200}, .rows_per_unit = rows, .fp32 = true, .bf16 = true, .e4m3 = e4m3};
      check_products(s);
      s.fp32 = false;
      s.n = 8, s.k = 16, s.rows = {1}, s.seed = 2;
      check_products(s);
      s.n = 776, s.k = 2064, s.rows = {300}, s.seed = 4;
      check_products(s);
      s.n = 136, s.k = 784, s.rows = {3, 0, 129, 64, 0, 1, 400}, s.scatter = true, s.seed = 5;
      check_products(s);
    }
  }
}

TEST(NarrowGemm, Experts) {
  for (const int rows : {16, 32, 64, 128}) {
    for (unsigned seed = 1; seed < 4; ++seed) {
      check_products({.n = 136,
                      .k = 784,
                      .rows = {3, 0, 129, 64, 0, 1, 400},
                      .rows_per_unit = rows,
                      .scatter = true,
                      .fp32 = seed == 2,
                      .seed = seed});
    }
  }
}

TEST(NarrowGemm, ARowsBitsDependOnNothingElse) {
  constexpr int kMost = 200, kN = 520;
  Problem problem({.n = kN, .k = 912, .rows = {kMost}});
  const OnGpu data(problem);
  OnDevice<std::uint16_t> out(std::size_t{kMost} * kN);
  std::vector<std::uint16_t> whole;
  for (int m = kMost; m >= 1; --m) {
    for (const int rows : {16, 32, 64, 128}) {
      NarrowGemm g = data.arguments(problem);
      g.m = g.x_rows = m;
      g.rows_per_unit = rows;
      g.out = out.get();
      g.out_stride = kN;
      out.poison();
      run(g);
      std::vector<std::uint16_t> got = out.host();
      if (whole.empty()) whole = got;
      const std::size_t size = std::size_t(m) * kN;
      ASSERT_TRUE(std::equal(got.begin(), got.begin() + std::ptrdiff_t(size), whole.begin()))
          << m << " rows, tiles of " << rows;
      for (std::size_t i = size; i < got.size(); ++i) ASSERT_EQ(got[i], 0xFFFF) << m << " rows";
    }
  }
}

void check_activations(const Shape& shape) {
  Problem problem(shape);
  const OnGpu data(problem);
  NarrowGemm g = data.arguments(problem);
  const int outputs = problem.outputs(), width = (outputs + 127) / 128;
  const std::size_t blocks = std::size_t(problem.m) * std::size_t(width);
  OnDevice<std::uint8_t> codes(blocks * 128);
  OnDevice<float> scales(blocks), offsets(blocks);
  g.out = codes.get();
  g.out_scales = scales.get();
  g.out_offsets = offsets.get();
  run(g);
  const std::vector<std::uint8_t> got_codes = codes.host();
  const std::vector<float> got_scales = scales.host(), got_offsets = offsets.host();
  double error = 0, total = 0;
  for (int i = 0; i < problem.m; ++i) {
    for (int b = 0; b < width; ++b) {
      const std::size_t at = std::size_t(i * width + b);
      const double scale = double{got_scales[at]};
      double sum = 0;
      for (int c = 0; c < 128; ++c) {
        const std::uint8_t code = got_codes[at * 128 + std::size_t(sm90::int4_order(c))];
        ASSERT_TRUE((code & 0x7F) != 0x7F) << "row " << i << " column " << 128 * b + c;
        const double value = double{to_float(E4m3{code})};
        sum += value;
        const int n = 128 * b + c;
        if (n >= outputs) {
          ASSERT_EQ(code & 0x7F, 0);
          continue;
        }
        const double want = silu(problem.product(i, n).value) * problem.product(i, outputs + n).value;
        error += (value * scale - want) * (value * scale - want);
        total += want * want;
      }
      ASSERT_NEAR(double{got_offsets[at]}, 8 * sum * scale, std::abs(sum * scale) * 1e-4 + 1e-5);
    }
  }
  EXPECT_LT(error / total, 2e-3);
}

TEST(NarrowGemm, ActivatesAndQuantises) {
  for (const int rows : {16, 32, 64, 128}) {
    check_activations({.n = 544, .k = 272, .rows = {130}, .rows_per_unit = rows, .silu = true});
    check_activations({.n = 320,
                       .k = 1168,
                       .rows = {3, 0, 129, 64, 0, 1, 90},
                       .rows_per_unit = rows,
                       .silu = true,
                       .divisor = 3});
  }
}

TEST(NarrowGemm, QuantisesRowsInOrder) {
  Random random(7);
  for (const int rows : {1, 3, 67}) {
    for (const int columns : {8, 128, 272, 2048}) {
      const int width = (columns + 127) / 128;
      const std::vector<std::uint16_t> x = random.bf16(std::size_t(rows) * std::size_t(columns), 1.0f);
      const OnDevice<std::uint16_t> x_device(x);
      OnDevice<std::uint8_t> codes(std::size_t(rows * width) * 128),
          plain(std::size_t(rows) * std::size_t(columns));
      OnDevice<float> scales(std::size_t(rows * width)), offsets(std::size_t(rows * width));
      sm90::QuantiseRows q;
      q.x = x_device.get();
      q.x_stride = q.columns = columns;
      q.codes = plain.get();
      q.scales = scales.get();
      q.rows = rows;
      check(sm90::quantise_rows(q, nullptr), "quantise_rows");
      const std::vector<float> want_scales = scales.host();
      q.codes = codes.get();
      q.offsets = offsets.get();
      check(sm90::quantise_rows(q, nullptr), "quantise_rows");
      EXPECT_EQ(scales.host(), want_scales);
      const std::vector<std::uint8_t> got = codes.host(), want = plain.host();
      const std::vector<float> got_offsets = offsets.host();
      for (int r = 0; r < rows; ++r) {
        for (int b = 0; b < width; ++b) {
          double sum = 0;
          for (int c = 0; c < 128; ++c) {
            const std::uint8_t code = got[std::size_t((r * width + b) * 128 + sm90::int4_order(c))];
            const int column = 128 * b + c;
            ASSERT_EQ(code, column < columns ? want[std::size_t(r * columns + column)] : 0)
                << r << ", " << column;
            sum += double{to_float(E4m3{code})};
          }
          const std::size_t at = std::size_t(r * width + b);
          ASSERT_NEAR(double{got_offsets[at]}, 8 * sum * double{want_scales[at]},
                      1e-4 * std::abs(sum) + 1e-6);
        }
      }
    }
  }
}

// Experts through both products, against fp64 sums over what the weights mean: activations are quantised twice.
TEST(NarrowGemm, ExpertsOfALayer) {
  Random random(11);
  for (const Layer layer : {Layer{256, 128, 8, 2}, Layer{272, 144, 20, 4}, Layer{1024, 384, 64, 6}}) {
    for (const int tokens : {2, 33, 150, 1200}) {
      Experts experts(random, layer, tokens, tokens == 150 ? 1 : -1, 8);
      const Int4Experts weights(random, experts);
      experts.args.fp8_rows = 0;
      const std::vector<std::uint16_t> got = experts.run(experts.args);
      double error = 0, total = 0;
      for (const int t : {0, tokens / 3, tokens - 1}) {
        const auto want = experts.expected(t, false);
        for (int i = 0; i < layer.hidden; ++i) {
          const std::size_t at = std::size_t(t) * std::size_t(experts.args.inout_stride) + std::size_t(i);
          const double before = double(from_bf16(experts.before[at]));
          const double own = double(from_bf16(got[at])) - before, sum = want[std::size_t(i)].value - before;
          ASSERT_TRUE(std::isfinite(own)) << "token " << t << " column " << i;
          error += (own - sum) * (own - sum);
          total += sum * sum;
        }
      }
      EXPECT_LT(error / total, 4e-3) << layer.hidden << " wide, " << tokens << " tokens";
      EXPECT_EQ(experts.run(experts.args), got) << "from run to run";
    }
  }
}

TEST(NarrowGemm, RefusesWhatItDoesNotTake) {
  Problem problem({.n = 264, .k = 400, .rows = {20}});
  const OnGpu data(problem);
  OnDevice<std::uint16_t> out(std::size_t{20} * 264);
  NarrowGemm g = data.arguments(problem);
  g.out = out.get();
  g.out_stride = 264;
  const auto refused = [&](auto&& change) {
    NarrowGemm changed = g;
    change(changed);
    return sm90::narrow_gemm(changed, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](NarrowGemm& a) { a.k = 392; }));
  EXPECT_TRUE(refused([](NarrowGemm& a) { a.n = 260; }));
  EXPECT_TRUE(refused([](NarrowGemm& a) { a.out_stride = 256; }));
  EXPECT_TRUE(refused([](NarrowGemm& a) { a.rows_per_unit = 48; }));
  EXPECT_TRUE(refused([](NarrowGemm& a) { a.x_offsets = nullptr; }));
  EXPECT_TRUE(refused([](NarrowGemm& a) { a.x = static_cast<const std::uint8_t*>(a.x) + 8; }));
}

}  // namespace
}  // namespace flash_mla::gpu_test
