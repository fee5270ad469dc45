// Products in FP8: the Hopper kernel's own code, thread by thread, on the CPU (tests/kernels/emulated), against what the
// codes and scales mean in float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/fp8.h"
#include "kernels/gemm/sm90/fp8_gemm.cuh"

namespace flash_mla::sm90::fp8 {

// The kernel's dynamic shared memory.
alignas(1024) std::byte dynamic_smem[228 << 10];

namespace {

float value_of(std::uint8_t code) { return to_float(E4m3{code}); }

struct Shape {
  int n = 256, k = 256;
  std::vector<int> rows = {128};  ///< of every matrix
  bool blocks = false;            ///< scales of 128 rows are alike
  bool gather = false, scatter = false, fp32 = false, accumulate = false;
  int divisor = 1, blocks_of_threads = 3, group = 16;
  unsigned seed = 1;
};

/// Random codes and scales; what no product may read is NaN.
struct Problem {
  explicit Problem(Shape shape) : s(std::move(shape)), rng(s.seed) {
    experts = static_cast<int>(s.rows.size());
    m = std::accumulate(s.rows.begin(), s.rows.end(), 0);
    for (int i = 0; i < m; ++i) pairs.push_back(i);
    std::shuffle(pairs.begin(), pairs.end(), rng);
    x_rows = s.gather ? (m + s.divisor - 1) / s.divisor : m;
    width = (s.k + 127) / 128;
    x_stride = s.k + 32;
    x = codes(x_rows, s.k, x_stride);
    weight = codes(std::int64_t{experts} * s.n, s.k, s.k);
    x_scales = scales(std::int64_t{x_rows} * width);
    const int scale_rows = (s.n + 7) / 8;
    weight_scales = scales(std::int64_t{experts} * scale_rows * width);
    if (s.blocks) {
      const int half = s.gather ? s.n / 16 : scale_rows;  // [gate; up]
      for (int e = 0; e < experts; ++e) {
        for (int r = 0; r < scale_rows; ++r) {
          const int first = r / half * half + r % half / 16 * 16;
          for (int c = 0; c < width; ++c) scale(e, r, c) = scale(e, first, c);
        }
      }
    }
    for (int e = 0, first = 0; e < experts; ++e) {
      const int count = s.rows[static_cast<std::size_t>(e)];
      for (int u = 0; u < count; u += 128) units.push_back({e, first + u, std::min(128, count - u)});
      for (int i = 0; i < count; ++i) expert_of.push_back(e);
      first += count;
    }
    num_units = static_cast<std::int32_t>(units.size());
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
  float& scale(int e, int row, int column) {
    return weight_scales[static_cast<std::size_t>((e * ((s.n + 7) / 8) + row) * width + column)];
  }

  /// Row `position` times row n of its expert's matrix.
  double product(int position, int n) {
    const int e = expert_of[static_cast<std::size_t>(position)];
    const int row = s.gather ? pairs[static_cast<std::size_t>(position)] / s.divisor : position;
    double sum = 0;
    for (int c = 0; c < width; ++c) {
      double part = 0;
      for (int k = 128 * c; k < std::min(s.k, 128 * c + 128); ++k) {
        part += double{value_of(x[static_cast<std::size_t>(std::int64_t{row} * x_stride + k)])} *
                double{value_of(weight[static_cast<std::size_t>((std::int64_t{e} * s.n + n) * s.k + k)])};
      }
      sum += part * double{x_scales[static_cast<std::size_t>(row * width + c)]} * double{scale(e, n / 8, c)};
    }
    return sum;
  }

  Params params(int columns) {
    Params p{};
    Fp8Gemm& g = p.gemm;
    g.x = x.data();
    g.x_stride = x_stride;
    g.x_scales = x_scales.data();
    g.weight = weight.data();
    g.weight_scales = weight_scales.data();
    g.m = m;
    g.n = s.n;
    g.k = s.k;
    g.experts = experts;
    g.x_rows = x_rows;
    if (experts > 1) {
      g.units = units.data();
      g.num_units = &num_units;
    }
    if (experts > 1 || s.scatter || s.gather) g.pairs = pairs.data();
    g.x_divisor = s.divisor;
    g.gather = s.gather;
    g.scatter = s.scatter;
    g.out_fp32 = s.fp32;
    g.accumulate = s.accumulate;
    g.tiles.columns = columns;
    g.tiles.group = s.group;
    const int outputs = s.gather ? s.n / 2 : s.n, tile = s.gather ? columns / 2 : columns;
    p.steps = width;
    p.column_tiles = (outputs + tile - 1) / tile;
    p.dense_units = (m + 127) / 128;
    p.scale_columns = static_cast<std::uint32_t>(width);
    p.scale_rows = static_cast<std::uint32_t>((s.n + 7) / 8);
    p.x_map = map(x, x_stride, x_rows, 1);
    p.weight_map = map(weight, s.k, s.n, experts);
    return p;
  }
  CUtensorMap map(const std::vector<std::uint8_t>& bytes, std::int64_t stride, int rows, int matrices) const {
    return {reinterpret_cast<const std::byte*>(bytes.data()),
            {s.k / 2, rows, matrices, 1, 1},
            {2, stride, rows * stride, 0, 0},
            {64, 64, 1, 1, 1}};
  }

  template <class C>
  void run(const Params& p) {
    for (int i = 0; i < s.blocks_of_threads; ++i) {
      emulated::Block block(kThreads, dynamic_smem, sizeof(dynamic_smem), s.seed + static_cast<unsigned>(i));
      block.block_index = {static_cast<unsigned>(i), 0, 0};
      block.grid_size = {static_cast<unsigned>(s.blocks_of_threads), 1, 1};
      block.run([&] { fp8_gemm_kernel<C>(p); });
    }
  }

  Shape s;
  std::mt19937 rng;
  int experts = 0, m = 0, x_rows = 0, width = 0, x_stride = 0;
  std::vector<std::int32_t> pairs;
  std::vector<ExpertUnit> units;
  std::vector<int> expert_of;
  std::int32_t num_units = 0;
  std::vector<std::uint8_t> x, weight;
  std::vector<float> x_scales, weight_scales;
};

template <int kColumns, bool kBlocks>
void check_products(const Shape& shape) {
  Problem problem(shape);
  const Shape& s = problem.s;
  Params p = problem.params(kColumns);
  const int stride = s.n + 8;
  const std::size_t size = static_cast<std::size_t>(problem.m) * static_cast<std::size_t>(stride);
  constexpr float kBefore = 0.75f;
  const float poison = s.accumulate ? kBefore : std::numeric_limits<float>::quiet_NaN();
  std::vector<float> wide(size, poison);
  std::vector<std::uint16_t> narrow(size, to_bf16(poison).bits);
  p.gemm.out = s.fp32 ? static_cast<void*>(wide.data()) : narrow.data();
  p.gemm.out_stride = stride;
  problem.run<Config<kColumns, false, false, kBlocks, 1>>(p);
  for (int i = 0; i < problem.m; ++i) {
    const int row = s.scatter ? problem.pairs[static_cast<std::size_t>(i)] : i;
    for (int n = 0; n < stride; ++n) {
      const auto at = static_cast<std::size_t>(row * stride + n);
      const float got = s.fp32 ? wide[at] : to_float(Bf16{narrow[at]});
      if (n >= s.n) {
        ASSERT_TRUE(s.accumulate ? got == kBefore : std::isnan(got)) << "padding of row " << row;
        continue;
      }
      const double want = problem.product(i, n) + (s.accumulate ? double{kBefore} : 0.0);
      const double bound = s.fp32 ? 1e-5 * std::abs(want) + 1e-4 : std::abs(want) / 256 + 1e-4;
      ASSERT_NEAR(double{got}, want, bound) << "row " << row << " column " << n;
    }
  }
}

template <bool kBlocks>
void check_activations(const Shape& shape) {
  Problem problem(shape);
  const Shape& s = problem.s;
  Params p = problem.params(256);
  const int outputs = s.n / 2, width = (outputs + 127) / 128;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(problem.m * outputs), 0x7F);
  std::vector<float> scales(static_cast<std::size_t>(problem.m * width),
                            std::numeric_limits<float>::quiet_NaN());
  p.gemm.out = codes.data();
  p.gemm.out_scales = scales.data();
  problem.run<Config<256, true, true, kBlocks, 1>>(p);
  for (int i = 0; i < problem.m; ++i) {
    for (int c = 0; c < width; ++c) {
      std::vector<double> want;
      double highest = 0;
      for (int n = 128 * c; n < std::min(outputs, 128 * c + 128); ++n) {
        const double gate = problem.product(i, n), up = problem.product(i, outputs + n);
        want.push_back(gate / (1 + std::exp(-gate)) * up);
        highest = std::max(highest, std::abs(want.back()));
      }
      const double scale = double{scales[static_cast<std::size_t>(i * width + c)]};
      ASSERT_NEAR(scale, highest / 448, highest / 448 * 1e-4) << "row " << i << " block " << c;
      for (std::size_t n = 0; n < want.size(); ++n) {
        const double got =
            double{value_of(codes[static_cast<std::size_t>(i * outputs + 128 * c) + n])} * scale;
        ASSERT_NEAR(got, want[n], std::abs(want[n]) / 15.5 + scale / 512 + 1e-4)
            << "row " << i << " column " << 128 * c + static_cast<int>(n);
      }
    }
  }
}

TEST(Fp8GemmBlock, OddSizes) {
  check_products<256, false>({.n = 264, .k = 400, .rows = {200}});
  check_products<256, false>({.n = 8, .k = 16, .rows = {1}, .seed = 2});
  check_products<256, false>({.n = 520, .k = 128, .rows = {65}, .seed = 3});
}

TEST(Fp8GemmBlock, MoreStagesThanTheRingHas) {
  check_products<256, false>({.n = 512, .k = 1296, .rows = {300}, .blocks_of_threads = 1, .group = 2});
  check_products<128, false>({.n = 384, .k = 1296, .rows = {140}, .blocks_of_threads = 2, .group = 1});
}

TEST(Fp8GemmBlock, AddsToWhatIsThere) {
  check_products<256, false>({.n = 272, .k = 144, .rows = {67}, .accumulate = true});
  check_products<128, false>({.n = 136, .k = 144, .rows = {67}, .fp32 = true, .accumulate = true});
}

TEST(Fp8GemmBlock, WholeBlocks) {
  check_products<256, true>({.n = 328, .k = 272, .rows = {130}, .blocks = true});
  check_products<128, true>({.n = 328, .k = 272, .rows = {130}, .blocks = true});
}

TEST(Fp8GemmBlock, Experts) {
  for (unsigned seed = 1; seed < 4; ++seed) {
    check_products<256, false>(
        {.n = 136, .k = 288, .rows = {3, 0, 129, 64, 0, 1}, .scatter = true, .fp32 = true, .seed = seed});
    check_products<256, true>(
        {.n = 136, .k = 288, .rows = {3, 0, 129, 64, 0, 1}, .blocks = true, .group = 2, .seed = seed});
  }
}

TEST(Fp8GemmBlock, ActivatesAndQuantises) {
  check_activations<false>({.n = 544, .k = 272, .rows = {130}, .gather = true});
  for (unsigned seed = 1; seed < 4; ++seed) {
    check_activations<false>(
        {.n = 320, .k = 144, .rows = {3, 0, 129, 64, 0, 1}, .gather = true, .divisor = 3, .seed = seed});
    check_activations<true>({.n = 320,
                             .k = 656,
                             .rows = {5, 140},
                             .blocks = true,
                             .gather = true,
                             .divisor = 2,
                             .blocks_of_threads = 1,
                             .seed = seed});
  }
}

}  // namespace
}  // namespace flash_mla::sm90::fp8
