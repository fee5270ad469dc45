// Products of few rows by streamed weights: the Hopper kernel's own code, thread by thread, on the CPU, against what
// weights of 16, 8 and 4 bits mean in float64.

#include <gtest/gtest.h>

#include "kernels/gemm/sm90/weight_stream.cuh"
#include "kernels/gemm/stream_problem.h"

namespace flash_mla::sm90 {

// The kernel's dynamic shared memory.
alignas(128) std::uint8_t shared[228 << 10];

namespace {

using stream_test::Case;
using stream_test::Problem;

/// `width`: outputs of an item along n.
template <int kGroups, int kTiles, int kWarpsN, int kWarpsK, StreamWeight kWeight>
void check(const Case& c, int width) {
  SCOPED_TRACE(testing::Message() << "m " << c.m << " n " << c.n << " k " << c.k << " width " << width);
  using Shape = StreamShape<kGroups, kTiles, kWarpsN, kWarpsK, kWeight>;
  const Problem problem(c, kWeight, 8 * kGroups);
  problem.check([&](void* out) {
    WeightStream p = problem.arguments(false);
    p.out = out;
    StreamGrid grid{};
    grid.row_tiles = (problem.outputs() + width - 1) / width;
    grid.row_groups = (c.m + 8 * kGroups - 1) / (8 * kGroups);
    grid.width = width;
    grid.cluster = 1;
    constexpr unsigned kBlocks = 2;
    for (unsigned i = 0; i < kBlocks; ++i) {
      emulated::Block block(Shape::kThreads, reinterpret_cast<std::byte*>(shared), sizeof(shared), 7 + i);
      block.block_index = {i, 0, 0};
      block.grid_size = {kBlocks, 1, 1};
      block.run([&] { stream_weights<Shape>(p, grid); });
    }
  });
}

// The stand-ins themselves: weights whose kernels have run on a GPU.
TEST(WeightStreamBlock, WiderWeights) {
  check<1, 1, 1, 4, StreamWeight::kBf16>({3, 40, 200}, 16);
  check<1, 2, 1, 4, StreamWeight::kE4m3>({3, 40, 272}, 32);
}

TEST(WeightStreamBlock, Int4OfFewRows) {
  check<1, 1, 1, 4, StreamWeight::kInt4>({1, 24, 16}, 16);
  check<1, 2, 1, 4, StreamWeight::kInt4>({5, 72, 272}, 24);
  check<1, 4, 1, 4, StreamWeight::kInt4>({8, 136, 656, 1, false, true}, 56);
  check<1, 6, 1, 4, StreamWeight::kInt4>({2, 104, 144}, 96);
  check<2, 2, 1, 4, StreamWeight::kInt4>({11, 40, 400}, 32);
  check<2, 4, 1, 4, StreamWeight::kInt4>({16, 64, 128}, 64);
}

TEST(WeightStreamBlock, Int4OfManyRows) {
  check<4, 2, 1, 4, StreamWeight::kInt4>({30, 40, 336}, 32);
  check<4, 4, 2, 2, StreamWeight::kInt4>({25, 136, 272}, 128);
  check<8, 2, 1, 4, StreamWeight::kInt4>({64, 40, 144, 1, false, true}, 24);
  check<8, 4, 2, 2, StreamWeight::kInt4>({61, 136, 208}, 120);
}

TEST(WeightStreamBlock, Int4Experts) {
  check<1, 1, 1, 4, StreamWeight::kInt4>({7, 48, 144, 4, true}, 8);
  check<1, 2, 1, 4, StreamWeight::kInt4>({9, 80, 272, 3, true}, 16);
  check<1, 4, 1, 4, StreamWeight::kInt4>({6, 48, 80, 5, false, true, true}, 24);
  check<2, 4, 1, 4, StreamWeight::kInt4>({40, 112, 144, 3, true}, 24);
  check<4, 4, 2, 2, StreamWeight::kInt4>({50, 160, 144, 3, true}, 64);
}

}  // namespace
}  // namespace flash_mla::sm90
