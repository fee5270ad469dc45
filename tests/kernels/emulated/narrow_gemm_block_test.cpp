// Products by narrow weights: the Hopper kernel's own code, thread by thread, on the CPU (tests/kernels/emulated), against what the codes
// and scales mean in float64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/element.h"
#include "kernels/gemm/narrow_problem.h"
#include "kernels/gemm/sm90/narrow_gemm.cuh"

namespace flash_mla::sm90::narrow {

// The kernel's dynamic shared memory.
alignas(1024) std::byte dynamic_smem[228 << 10];

namespace {

using narrow_test::Problem;
using narrow_test::Shape;

struct Run {
  explicit Run(Problem& problem) : num_units(static_cast<std::int32_t>(problem.units.size())) {
    NarrowGemm& g = p.gemm;
    g = problem.arguments();
    g.x = problem.s.bf16 ? static_cast<const void*>(problem.wide.data()) : problem.x.data();
    g.x_scales = problem.x_scales.data();
    g.x_offsets = problem.x_offsets.data();
    g.weight = problem.s.e4m3 ? static_cast<const void*>(problem.codes.data()) : problem.words.data();
    g.weight_scales = problem.weight_scales.data();
    if (problem.experts > 1) {
      g.units = problem.units.data();
      g.num_units = &num_units;
    }
    if (problem.s.silu || problem.s.scatter) g.pairs = problem.pairs.data();
    p.steps = problem.width;
    p.dense_units = (problem.m + g.rows_per_unit - 1) / g.rows_per_unit;
    const std::int64_t rows = g.e4m3 ? g.n : g.n / 2;
    p.weight_map = {static_cast<const std::byte*>(g.weight),
                    {g.k / 2, rows, g.experts, 1, 1},
                    {2, g.k, rows * g.k, 0, 0},
                    {64, g.e4m3 ? 2 * kBlockRows : kBlockRows, 1, 1, 1}};
  }
  Run(const Run&) = delete;

  template <class C>
  void run(int outputs, int blocks, unsigned seed) {
    static_assert(sizeof(Shared<C>) + 1024 <= sizeof(dynamic_smem));
    p.column_tiles = (outputs + C::kOutputs - 1) / C::kOutputs;
    for (int i = 0; i < blocks; ++i) {
      std::fill(std::begin(dynamic_smem), std::end(dynamic_smem), std::byte{0x7F});
      emulated::Block block(kThreads, dynamic_smem, sizeof(dynamic_smem), seed + static_cast<unsigned>(i));
      block.block_index = {static_cast<unsigned>(i), 0, 0};
      block.grid_size = {static_cast<unsigned>(blocks), 1, 1};
      block.run([&] { narrow_gemm_kernel<C>(p); });
    }
  }

  Params p{};
  std::int32_t num_units;
};

template <int kRows>
void check_products(Shape shape, int blocks = 2) {
  shape.rows_per_unit = kRows;
  Problem problem(shape);
  Run run(problem);
  const int stride = shape.n + 8;
  const std::size_t size = static_cast<std::size_t>(problem.m) * static_cast<std::size_t>(stride);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> wide(size, nan);
  std::vector<std::uint16_t> narrow(size, to_bf16(nan).bits);
  run.p.gemm.out = shape.fp32 ? static_cast<void*>(wide.data()) : narrow.data();
  run.p.gemm.out_stride = stride;
  if (shape.bf16) {
    if constexpr (kRows <= 64) {
      if (shape.e4m3) {
        run.run<Config<kRows, false, Kind::kW8A16>>(shape.n, blocks, shape.seed);
      } else {
        run.run<Config<kRows, false, Kind::kW4A16>>(shape.n, blocks, shape.seed);
      }
    }
  } else {
    run.run<Config<kRows, false, Kind::kW4A8>>(shape.n, blocks, shape.seed);
  }
  for (int i = 0; i < problem.m; ++i) {
    const int row = shape.scatter ? problem.pairs[static_cast<std::size_t>(i)] : i;
    for (int n = 0; n < stride; ++n) {
      const std::size_t at =
          static_cast<std::size_t>(row) * static_cast<std::size_t>(stride) + static_cast<std::size_t>(n);
      const float got = shape.fp32 ? wide[at] : to_float(Bf16{narrow[at]});
      if (n >= shape.n) {
        ASSERT_TRUE(std::isnan(got)) << "padding of row " << row;
        continue;
      }
      const Problem::Sum want = problem.product(i, n);
      const double rounding = shape.fp32 ? 0 : std::abs(want.value) / 256;
      ASSERT_NEAR(static_cast<double>(got), want.value, rounding + want.size * 1e-6 + 1e-6)
          << "row " << row << " column " << n;
    }
  }
}

template <int kRows>
void check_activations(Shape shape, int blocks = 2) {
  shape.rows_per_unit = kRows;
  shape.silu = true;
  Problem problem(shape);
  Run run(problem);
  const int outputs = problem.outputs(), width = (outputs + 127) / 128;
  const auto blocks_of_rows = static_cast<std::size_t>(problem.m * width);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<std::uint8_t> codes(blocks_of_rows * 128, 0x7F);
  std::vector<float> scales(blocks_of_rows, nan), offsets(blocks_of_rows, nan);
  run.p.gemm.out = codes.data();
  run.p.gemm.out_scales = scales.data();
  run.p.gemm.out_offsets = offsets.data();
  run.run<Config<kRows, true, Kind::kW4A8>>(outputs, blocks, shape.seed);
  for (int i = 0; i < problem.m; ++i) {
    for (int b = 0; b < width; ++b) {
      const auto at = static_cast<std::size_t>(i * width + b);
      std::vector<double> want;
      double highest = 0, sum = 0;
      for (int n = 128 * b; n < std::min(outputs, 128 * b + 128); ++n) {
        const double gate = problem.product(i, n).value, up = problem.product(i, outputs + n).value;
        want.push_back(gate / (1 + std::exp(-gate)) * up);
        highest = std::max(highest, std::abs(want.back()));
      }
      const auto scale = static_cast<double>(scales[at]);
      ASSERT_NEAR(scale, highest / 448, highest / 448 * 1e-3) << "row " << i << " block " << b;
      for (int c = 0; c < 128; ++c) {
        const double got =
            static_cast<double>(to_float(E4m3{codes[at * 128 + static_cast<std::size_t>(int4_order(c))]}));
        sum += got;
        const double expected = c < static_cast<int>(want.size()) ? want[static_cast<std::size_t>(c)] : 0;
        ASSERT_NEAR(got * scale, expected, std::abs(expected) / 15 + scale / 256 + highest * 1e-4)
            << "row " << i << " column " << 128 * b + c;
      }
      ASSERT_NEAR(static_cast<double>(offsets[at]), 8 * sum * scale, std::abs(sum * scale) * 1e-5 + 1e-5);
    }
  }
}

template <int kRows>
void check_bf16_activations(Shape shape, int blocks = 2) {
  shape.rows_per_unit = kRows;
  shape.silu = shape.bf16 = shape.scatter = true;
  Problem problem(shape);
  Run run(problem);
  const int outputs = problem.outputs(), stride = outputs + 8;
  std::vector<std::uint16_t> out(static_cast<std::size_t>(problem.m * stride), 0x7FC0);
  run.p.gemm.out = out.data();
  run.p.gemm.out_stride = stride;
  if (shape.e4m3) {
    run.run<Config<kRows, true, Kind::kW8A16>>(outputs, blocks, shape.seed);
  } else {
    run.run<Config<kRows, true, Kind::kW4A16>>(outputs, blocks, shape.seed);
  }
  for (int i = 0; i < problem.m; ++i) {
    const int row = problem.pairs[static_cast<std::size_t>(i)];
    for (int n = 0; n < stride; ++n) {
      const float got = to_float(Bf16{out[static_cast<std::size_t>(row * stride + n)]});
      if (n >= outputs) {
        ASSERT_TRUE(std::isnan(got)) << "padding of row " << row;
        continue;
      }
      const double gate = problem.product(i, n).value, up = problem.product(i, outputs + n).value;
      const double want = gate / (1 + std::exp(-gate)) * up;
      ASSERT_NEAR(static_cast<double>(got), want, std::abs(want) / 200 + 1e-4)
          << "row " << row << " column " << n;
    }
  }
}

TEST(NarrowGemmBlock, Bf16) {
  check_products<16>({.n = 264, .k = 400, .rows = {20}, .fp32 = true, .bf16 = true});
  check_products<16>({.n = 8, .k = 16, .rows = {1}, .bf16 = true, .seed = 2});
  check_products<32>({.n = 520, .k = 128, .rows = {65}, .bf16 = true, .seed = 3});
  check_products<64>({.n = 72, .k = 144, .rows = {64}, .bf16 = true, .seed = 4});
  check_products<16>({.n = 512, .k = 1680, .rows = {30}, .bf16 = true}, 1);
  for (unsigned seed = 1; seed < 4; ++seed) {
    check_products<16>(
        {.n = 136, .k = 288, .rows = {3, 0, 33, 16, 0, 1}, .scatter = true, .bf16 = true, .seed = seed});
  }
}

TEST(NarrowGemmBlock, ActivatesBf16) {
  check_bf16_activations<16>({.n = 544, .k = 272, .rows = {20}});
  check_bf16_activations<16>({.n = 320, .k = 144, .rows = {3, 0, 17, 16, 0, 1}, .divisor = 3});
  check_bf16_activations<32>({.n = 272, .k = 144, .rows = {40}, .divisor = 2, .seed = 7});
  check_bf16_activations<64>({.n = 512, .k = 128, .rows = {9, 70}, .seed = 8}, 1);
}

TEST(NarrowGemmBlock, E4m3Weights) {
  check_products<16>({.n = 264, .k = 400, .rows = {20}, .fp32 = true, .bf16 = true, .e4m3 = true});
  check_products<16>({.n = 8, .k = 16, .rows = {1}, .bf16 = true, .e4m3 = true, .seed = 2});
  check_products<32>({.n = 520, .k = 128, .rows = {65}, .bf16 = true, .e4m3 = true, .seed = 3});
  check_products<64>({.n = 72, .k = 144, .rows = {64}, .bf16 = true, .e4m3 = true, .seed = 4});
  check_products<16>({.n = 512, .k = 1680, .rows = {30}, .bf16 = true, .e4m3 = true}, 1);
  check_products<16>(
      {.n = 136, .k = 288, .rows = {3, 0, 33, 16, 0, 1}, .scatter = true, .bf16 = true, .e4m3 = true});
  check_bf16_activations<16>({.n = 544, .k = 272, .rows = {20}, .e4m3 = true});
  check_bf16_activations<16>({.n = 320, .k = 144, .rows = {3, 0, 17, 16, 0, 1}, .e4m3 = true, .divisor = 3});
  check_bf16_activations<64>({.n = 512, .k = 128, .rows = {9, 70}, .e4m3 = true, .seed = 8}, 1);
}

TEST(NarrowGemmBlock, OrderIsAPermutation) {
  std::vector<bool> seen(128);
  for (int c = 0; c < 128; ++c) seen[static_cast<std::size_t>(int4_order(c))] = true;
  EXPECT_EQ(std::count(seen.begin(), seen.end(), true), 128);
}

TEST(NarrowGemmBlock, OddSizes) {
  check_products<16>({.n = 264, .k = 400, .rows = {20}, .fp32 = true});
  check_products<16>({.n = 8, .k = 16, .rows = {1}, .seed = 2});
  check_products<32>({.n = 520, .k = 128, .rows = {65}, .seed = 3});
  check_products<64>({.n = 72, .k = 144, .rows = {64}, .seed = 4});
  check_products<128>({.n = 328, .k = 272, .rows = {130}, .seed = 5});
}

TEST(NarrowGemmBlock, MoreStagesThanTheRingHas) {
  check_products<16>({.n = 512, .k = 1680, .rows = {30}}, 1);
  check_products<128>({.n = 256, .k = 1296, .rows = {140}}, 1);
}

TEST(NarrowGemmBlock, Experts) {
  for (unsigned seed = 1; seed < 4; ++seed) {
    check_products<16>({.n = 136, .k = 288, .rows = {3, 0, 33, 16, 0, 1}, .scatter = true, .seed = seed});
  }
  check_products<64>({.n = 136, .k = 288, .rows = {3, 0, 70}, .scatter = true, .fp32 = true, .seed = 9});
}

TEST(NarrowGemmBlock, ActivatesAndQuantises) {
  check_activations<16>({.n = 544, .k = 272, .rows = {20}});
  for (unsigned seed = 1; seed < 4; ++seed) {
    check_activations<16>({.n = 320, .k = 144, .rows = {3, 0, 17, 16, 0, 1}, .divisor = 3, .seed = seed});
  }
  check_activations<32>({.n = 272, .k = 144, .rows = {40}, .divisor = 2, .seed = 7});
  check_activations<64>({.n = 512, .k = 128, .rows = {9, 70}, .seed = 8}, 1);
  check_activations<128>({.n = 256, .k = 656, .rows = {5, 140}, .divisor = 2, .seed = 9}, 1);
}

}  // namespace
}  // namespace flash_mla::sm90::narrow
