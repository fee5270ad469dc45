// Products in FP8 against what codes and scales mean in fp64, and against what was quantised.

#include "kernels/gemm/sm90/fp8_gemm.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "base/element.h"
#include "experts.h"
#include "kernels/gemm/fp8_problem.h"
#include "kernels/quant/sm90/quantise_rows.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

using fp8_test::Problem;
using fp8_test::Shape;
using fp8_test::value_of;
using sm90::Fp8Gemm;

/// 1 - 2 (x·y) / (x·x + y·y)
struct Difference {
  double xy = 0, squares = 0;
  void add(double x, double y) {
    xy += x * y;
    squares += x * x + y * y;
  }
  double value() const { return squares == 0 ? 0 : 1 - 2 * xy / squares; }
};

/// A problem's data on the GPU.
struct OnGpu {
  explicit OnGpu(const Problem& problem)
      : x(problem.x),
        weight(problem.weight),
        x_scales(problem.x_scales),
        weight_scales(problem.weight_scales),
        pairs(problem.pairs),
        units(problem.units),
        num_units(std::vector<std::int32_t>{static_cast<std::int32_t>(problem.units.size())}) {}

  Fp8Gemm arguments(const Problem& problem, int columns) const {
    Fp8Gemm g = problem.arguments(columns);
    g.x = x.get();
    g.x_scales = x_scales.get();
    g.weight = weight.get();
    g.weight_scales = weight_scales.get();
    if (problem.experts > 1) {
      g.units = units.get();
      g.num_units = num_units.get();
    }
    if (problem.s.scatter || problem.s.silu) g.pairs = pairs.get();
    return g;
  }

  OnDevice<std::uint8_t> x, weight;
  OnDevice<float> x_scales, weight_scales;
  OnDevice<std::int32_t> pairs;
  OnDevice<sm90::ExpertUnit> units;
  OnDevice<std::int32_t> num_units;
};

void run(const Fp8Gemm& g) {
  ASSERT_TRUE(sm90::fits_fp8_gemm(g));
  check(sm90::fp8_gemm(g, nullptr), "fp8_gemm");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

/// Both with every tile of `columns`.
void check_products(const Shape& shape, int columns) {
  Problem problem(shape);
  const Shape& s = problem.s;
  const OnGpu data(problem);
  Fp8Gemm g = data.arguments(problem, columns);
  const int stride = s.n + 8;
  const std::size_t size = std::size_t(problem.m) * std::size_t(stride);
  constexpr float kBefore = 0.75f;
  const float poison = s.accumulate ? kBefore : std::numeric_limits<float>::quiet_NaN();
  OnDevice<float> wide(std::vector<float>(s.fp32 ? size : 1, poison));
  OnDevice<std::uint16_t> narrow(std::vector<std::uint16_t>(size, to_bf16(poison)));
  g.out = s.fp32 ? static_cast<void*>(wide.get()) : narrow.get();
  g.out_stride = stride;
  run(g);
  const std::vector<float> got_wide = wide.host();
  const std::vector<std::uint16_t> got_narrow = narrow.host();
  Difference difference;
  for (int i = 0; i < problem.m; ++i) {
    const int row = s.scatter ? problem.pairs[std::size_t(i)] : i;
    for (int n = 0; n < stride; ++n) {
      const std::size_t at = std::size_t(row) * std::size_t(stride) + std::size_t(n);
      const float got = s.fp32 ? got_wide[at] : from_bf16(got_narrow[at]);
      if (n >= s.n) {
        ASSERT_TRUE(s.accumulate ? got == kBefore : std::isnan(got)) << "padding of row " << row;
        continue;
      }
      const double want = problem.product(i, n) + (s.accumulate ? double{kBefore} : 0.0);
      difference.add(double{got}, want);
      // Tensor cores keep some 14 bits of the sum of 128 products.
      ASSERT_NEAR(double{got}, want, std::abs(want) / 64 + 0.25) << "row " << row << " column " << n;
    }
  }
  EXPECT_LT(difference.value(), 5e-6);
}

TEST(Fp8Gemm, OddSizes) {
  for (const int columns : {128, 256}) {
    for (const bool blocks : {false, true}) {
      check_products({.n = 264, .k = 400, .rows = {200}, .blocks = blocks}, columns);
      check_products({.n = 8, .k = 16, .rows = {1}, .blocks = blocks, .seed = 2}, columns);
      check_products({.n = 520, .k = 128, .rows = {65}, .blocks = blocks, .seed = 3}, columns);
      check_products({.n = 776, .k = 1296, .rows = {300}, .blocks = blocks, .group = 2}, columns);
    }
  }
}

TEST(Fp8Gemm, WarpgroupsTakeTurns) {
  for (const int rows : {40, 200, 700}) {
    Shape s{.n = 536, .k = 1040, .rows = {rows}, .group = 2, .turns = true};
    check_products(s, 256);
    check_products(s, 128);
    s.rows = {rows, 0, 130};
    s.scatter = s.fp32 = true;
    check_products(s, 256);
  }
}

TEST(Fp8Gemm, AddsToWhatIsThere) {
  check_products({.n = 272, .k = 144, .rows = {67}, .accumulate = true}, 256);
  check_products({.n = 136, .k = 144, .rows = {67}, .fp32 = true, .accumulate = true}, 128);
}

TEST(Fp8Gemm, Experts) {
  for (unsigned seed = 1; seed < 4; ++seed) {
    Shape s{.n = 136, .k = 784, .rows = {3, 0, 129, 64, 0, 1, 400}, .turns = seed == 2, .seed = seed};
    s.scatter = s.fp32 = true;
    check_products(s, 256);
    s.blocks = true;
    s.scatter = s.fp32 = false;
    check_products(s, 256);
  }
}

TEST(Fp8Gemm, ARowsBitsDependOnNothingElse) {
  constexpr int kMost = 300, kN = 520;
  Problem problem({.n = kN, .k = 912, .rows = {kMost}});
  const OnGpu data(problem);
  OnDevice<std::uint16_t> out(std::size_t{kMost} * kN);
  std::vector<std::uint16_t> whole;
  for (int m = kMost; m >= 1; --m) {
    for (const sm90::Fp8Tiles tiles : {sm90::Fp8Tiles{256, 16, true}, {128, 2}, {256, 1}}) {
      Fp8Gemm g = data.arguments(problem, 256);
      g.tiles = tiles;
      g.m = g.x_rows = m;
      g.out = out.get();
      g.out_stride = kN;
      out.poison();
      run(g);
      std::vector<std::uint16_t> got = out.host();
      if (whole.empty()) whole = got;
      const std::size_t size = std::size_t(m) * kN;
      ASSERT_TRUE(std::equal(got.begin(), got.begin() + std::ptrdiff_t(size), whole.begin()))
          << m << " rows, tiles of " << tiles.columns;
      for (std::size_t i = size; i < got.size(); ++i) ASSERT_EQ(got[i], 0xFFFF) << m << " rows";
    }
  }
}

void check_activations(const Shape& shape) {
  Problem problem(shape);
  const OnGpu data(problem);
  Fp8Gemm g = data.arguments(problem, 256);
  const int outputs = problem.outputs(), width = (outputs + 127) / 128;
  OnDevice<std::uint8_t> codes(std::size_t(problem.m) * std::size_t(outputs));
  OnDevice<float> scales(std::size_t(problem.m) * std::size_t(width));
  g.out = codes.get();
  g.out_scales = scales.get();
  run(g);
  const std::vector<std::uint8_t> got_codes = codes.host();
  const std::vector<float> got_scales = scales.host();
  Difference difference;
  for (int i = 0; i < problem.m; ++i) {
    for (int c = 0; c < width; ++c) {
      std::vector<double> want;
      double highest = 0;
      for (int n = 128 * c; n < std::min(outputs, 128 * c + 128); ++n) {
        want.push_back(silu(problem.product(i, n)) * problem.product(i, outputs + n));
        highest = std::max(highest, std::abs(want.back()));
      }
      const double scale = double{got_scales[std::size_t(i * width + c)]};
      ASSERT_NEAR(scale, highest / 448, highest / 448 * 1e-2 + 1e-6) << "row " << i << " block " << c;
      for (std::size_t n = 0; n < want.size(); ++n) {
        const std::uint8_t code = got_codes[std::size_t(i * outputs + 128 * c) + n];
        ASSERT_TRUE((code & 0x7F) != 0x7F) << "row " << i << " column " << 128 * c + int(n);
        difference.add(double{value_of(code)} * scale, want[n]);
      }
    }
  }
  EXPECT_LT(difference.value(), 1e-3);
}

TEST(Fp8Gemm, ActivatesAndQuantises) {
  for (const bool blocks : {false, true}) {
    for (const bool turns : {false, true}) {
      Shape s{.n = 544, .k = 272, .rows = {330}, .blocks = blocks, .silu = true, .turns = turns};
      check_activations(s);
      s = {.n = 320, .k = 1168, .rows = {3, 0, 129, 64, 0, 1, 290}, .blocks = blocks, .silu = true};
      s.turns = turns;
      s.divisor = 3;
      check_activations(s);
    }
  }
}

TEST(Fp8Gemm, QuantisesRows) {
  Random random(7);
  for (const int rows : {1, 3, 257}) {
    for (const int columns : {8, 128, 272, 2048}) {
      const int stride = columns + 16, width = (columns + 127) / 128;
      std::vector<std::uint16_t> x = random.bf16(std::size_t(rows) * std::size_t(stride), 1.0f);
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (int(i) % stride >= columns) x[i] = 0x7FC0;  // NaN, not to be read
        if (random.below(300) == 0) x[i] = to_bf16(from_bf16(x[i]) * 100.0f);
      }
      for (int c = 0; c < std::min(columns, 128); ++c) x[std::size_t(c)] = 0;  // a block of zeros
      const OnDevice<std::uint16_t> x_device(x);
      OnDevice<std::uint8_t> codes(std::size_t(rows) * std::size_t(columns));
      OnDevice<float> scales(std::size_t(rows) * std::size_t(width));
      sm90::QuantiseRows q;
      q.x = x_device.get();
      q.x_stride = stride;
      q.codes = codes.get();
      q.scales = scales.get();
      q.rows = rows;
      q.columns = columns;
      check(sm90::quantise_rows(q, nullptr), "quantise_rows");
      const std::vector<std::uint8_t> got = codes.host();
      const std::vector<float> got_scales = scales.host();
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < columns; ++c) {
          const float scale = got_scales[std::size_t(r * width + c / 128)];
          const double want = double(from_bf16(x[std::size_t(r * stride + c)]));
          const double value = double{value_of(got[std::size_t(r * columns + c)])} * double{scale};
          ASSERT_NEAR(value, want, std::abs(want) / 15.9 + double{scale} / 512 + 1e-30)
              << rows << " x " << columns << ": row " << r << " column " << c;
        }
      }
    }
  }
}

TEST(Fp8Gemm, RefusesWhatItDoesNotTake) {
  Problem problem({.n = 264, .k = 400, .rows = {20}});
  const OnGpu data(problem);
  OnDevice<std::uint16_t> out(std::size_t{20} * 264);
  Fp8Gemm g = data.arguments(problem, 256);
  g.out = out.get();
  g.out_stride = 264;
  const auto refused = [&](auto&& change) {
    Fp8Gemm changed = g;
    change(changed);
    return sm90::fp8_gemm(changed, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.k = 392; }));
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.n = 260; }));
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.out_stride = 268; }));
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.x_stride = 392; }));
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.tiles.columns = 64; }));
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.x_scales = nullptr; }));
  EXPECT_TRUE(refused([](Fp8Gemm& a) { a.x = static_cast<const std::uint8_t*>(a.x) + 8; }));
}

// Experts through both products, against fp64 sums over what the weights mean: activations are quantised twice.
TEST(Fp8Gemm, ExpertsOfALayer) {
  Random random(11);
  for (const Layer layer : {Layer{256, 128, 8, 2}, Layer{272, 144, 20, 4}, Layer{1024, 384, 64, 6}}) {
    for (const int tokens : {2, 33, 150, 2400}) {
      const int favourite = tokens == 150 ? 1 : -1;
      Experts experts(random, layer, tokens, favourite, 8);
      const E4m3Experts weights(random, experts, false);
      experts.args.fp8_rows = 0;
      const std::vector<std::uint16_t> got = experts.run(experts.args);
      Difference difference;
      for (const int t : {0, tokens / 3, tokens - 1}) {
        const auto want = experts.expected(t, false);
        for (int i = 0; i < layer.hidden; ++i) {
          const std::size_t at = std::size_t(t) * std::size_t(experts.args.inout_stride) + std::size_t(i);
          const double before = double(from_bf16(experts.before[at]));
          const double own = double(from_bf16(got[at])) - before, sum = want[std::size_t(i)].value - before;
          ASSERT_TRUE(std::isfinite(own)) << "token " << t << " column " << i;
          difference.add(own, sum);
        }
      }
      EXPECT_LT(difference.value(), 2e-3) << layer.hidden << " wide, " << tokens << " tokens";
      EXPECT_EQ(experts.run(experts.args), got) << "from run to run";
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (std::int64_t(i) % experts.args.inout_stride >= layer.hidden) {
          ASSERT_EQ(got[i], experts.before[i]) << "padding";
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::gpu_test
