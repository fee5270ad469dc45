// Products in FP8: the Hopper kernel's own code, thread by thread, on the CPU (tests/kernels/emulated), against what the
// codes and scales mean in float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/element.h"
#include "kernels/gemm/fp8_problem.h"
#include "kernels/gemm/sm90/fp8_gemm.cuh"

namespace flash_mla::sm90::fp8 {

// The kernel's dynamic shared memory.
alignas(1024) std::byte dynamic_smem[228 << 10];

namespace {

using fp8_test::Problem;
using fp8_test::Shape;
using fp8_test::value_of;

CUtensorMap map(const std::vector<std::uint8_t>& bytes, std::int64_t stride, const Problem& problem, int rows,
                int matrices) {
  return {reinterpret_cast<const std::byte*>(bytes.data()),
          {problem.s.k / 2, rows, matrices, 1, 1},
          {2, stride, rows * stride, 0, 0},
          {64, 64, 1, 1, 1}};
}

struct Run {
  Run(Problem& problem, int columns) {
    const Shape& s = problem.s;
    num_units = static_cast<std::int32_t>(problem.units.size());
    Fp8Gemm& g = p.gemm;
    g = problem.arguments(columns);
    g.x = problem.x.data();
    g.x_scales = problem.x_scales.data();
    g.weight = problem.weight.data();
    g.weight_scales = problem.weight_scales.data();
    if (problem.experts > 1) {
      g.units = problem.units.data();
      g.num_units = &num_units;
    }
    if (s.scatter || s.silu) g.pairs = problem.pairs.data();
    const int outputs = problem.outputs(), tile = s.silu ? columns / 2 : columns;
    p.steps = problem.width;
    p.column_tiles = (outputs + tile - 1) / tile;
    p.dense_units = (problem.m + 127) / 128;
    p.scale_columns = static_cast<std::uint32_t>(problem.width);
    p.scale_rows = static_cast<std::uint32_t>(problem.scale_rows);
    p.x_map = map(problem.x, problem.x_stride, problem, problem.x_rows, 1);
    p.weight_map = map(problem.weight, s.k, problem, s.n, problem.experts);
  }
  Run(const Run&) = delete;

  template <class C>
  void run(int blocks, unsigned seed) const {
    for (int i = 0; i < blocks; ++i) {
      emulated::Block block(kThreads, dynamic_smem, sizeof(dynamic_smem), seed + static_cast<unsigned>(i));
      block.block_index = {static_cast<unsigned>(i), 0, 0};
      block.grid_size = {static_cast<unsigned>(blocks), 1, 1};
      block.run([&] { fp8_gemm_kernel<C>(p); });
    }
  }

  Params p{};
  std::int32_t num_units = 0;
};

template <int kColumns, bool kBlocks>
void check_products(const Shape& shape, int blocks_of_threads = 3) {
  Problem problem(shape);
  const Shape& s = problem.s;
  Run run(problem, kColumns);
  const int stride = s.n + 8;
  const std::size_t size = static_cast<std::size_t>(problem.m) * static_cast<std::size_t>(stride);
  constexpr float kBefore = 0.75f;
  const float poison = s.accumulate ? kBefore : std::numeric_limits<float>::quiet_NaN();
  std::vector<float> wide(size, poison);
  std::vector<std::uint16_t> narrow(size, to_bf16(poison).bits);
  run.p.gemm.out = s.fp32 ? static_cast<void*>(wide.data()) : narrow.data();
  run.p.gemm.out_stride = stride;
  run.run<Config<kColumns, false, false, kBlocks>>(blocks_of_threads, s.seed);
  for (int i = 0; i < problem.m; ++i) {
    const int row = s.scatter ? problem.pairs[static_cast<std::size_t>(i)] : i;
    for (int n = 0; n < stride; ++n) {
      const std::size_t at =
          static_cast<std::size_t>(row) * static_cast<std::size_t>(stride) + static_cast<std::size_t>(n);
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
void check_activations(const Shape& shape, int blocks_of_threads = 3) {
  Problem problem(shape);
  Run run(problem, 256);
  const int outputs = problem.outputs(), width = (outputs + 127) / 128;
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(std::int64_t{problem.m} * outputs), 0x7F);
  std::vector<float> scales(static_cast<std::size_t>(std::int64_t{problem.m} * width),
                            std::numeric_limits<float>::quiet_NaN());
  run.p.gemm.out = codes.data();
  run.p.gemm.out_scales = scales.data();
  run.run<Config<256, true, true, kBlocks>>(blocks_of_threads, shape.seed);
  for (int i = 0; i < problem.m; ++i) {
    for (int c = 0; c < width; ++c) {
      std::vector<double> want;
      double highest = 0;
      for (int n = 128 * c; n < std::min(outputs, 128 * c + 128); ++n) {
        const double gate = problem.product(i, n), up = problem.product(i, outputs + n);
        want.push_back(gate / (1 + std::exp(-gate)) * up);
        highest = std::max(highest, std::abs(want.back()));
      }
      const double scale = double{scales[static_cast<std::size_t>(std::int64_t{i} * width + c)]};
      ASSERT_NEAR(scale, highest / 448, highest / 448 * 1e-4) << "row " << i << " block " << c;
      for (std::size_t n = 0; n < want.size(); ++n) {
        const double got =
            double{value_of(codes[static_cast<std::size_t>(std::int64_t{i} * outputs + 128 * c) + n])} *
            scale;
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
  check_products<256, false>({.n = 512, .k = 1296, .rows = {300}, .group = 2}, 1);
  check_products<128, false>({.n = 384, .k = 1296, .rows = {140}, .group = 1}, 2);
}

TEST(Fp8GemmBlock, WarpgroupsTakeTurns) {
  check_products<256, true>({.n = 264, .k = 784, .rows = {200}, .blocks = true, .turns = true}, 1);
  check_activations<false>({.n = 320, .k = 144, .rows = {3, 0, 129, 1}, .silu = true, .turns = true}, 2);
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
  check_activations<false>({.n = 544, .k = 272, .rows = {130}, .silu = true});
  for (unsigned seed = 1; seed < 4; ++seed) {
    check_activations<false>(
        {.n = 320, .k = 144, .rows = {3, 0, 129, 64, 0, 1}, .silu = true, .divisor = 3, .seed = seed});
    check_activations<true>(
        {.n = 320, .k = 656, .rows = {5, 140}, .blocks = true, .silu = true, .divisor = 2, .seed = seed}, 1);
  }
}

}  // namespace
}  // namespace flash_mla::sm90::fp8
