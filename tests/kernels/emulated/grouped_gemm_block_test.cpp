// The experts' products of many rows: the Hopper kernel's own code, thread by thread, on the CPU, against what weights of
// 16, 8 and 4 bits mean, rounded to bfloat16, in float64.

#include <gtest/gtest.h>

#include "kernels/gemm/sm90/grouped_gemm.cuh"
#include "kernels/gemm/stream_problem.h"

namespace flash_mla::sm90::grouped {

// The kernel's dynamic shared memory.
alignas(1024) std::uint8_t raw[228 << 10];

namespace {

using stream_test::Case;
using stream_test::Problem;

template <StreamWeight kWeight>
void check(const Case& c, unsigned blocks) {
  SCOPED_TRACE(testing::Message() << "m " << c.m << " n " << c.n << " k " << c.k);
  const Problem problem(c, kWeight, kGroupedRows, true);
  problem.check([&](void* out) {
    WeightStream p = problem.arguments(true);
    p.out = out;
    Grid grid{};
    grid.width = c.silu ? kColumns / 2 : kColumns;
    grid.column_tiles = (problem.outputs() + grid.width - 1) / grid.width;
    for (unsigned i = 0; i < blocks; ++i) {
      emulated::Block block(kThreads, reinterpret_cast<std::byte*>(raw), sizeof(raw), 7 + i);
      block.block_index = {i, 0, 0};
      block.grid_size = {blocks, 1, 1};
      block.run([&] { grouped_gemm<kWeight>(p, grid); });
    }
  });
}

// The stand-ins themselves: weights whose kernels have run on a GPU.
TEST(GroupedGemmBlock, WiderWeights) {
  check<StreamWeight::kBf16>({5, 72, 136}, 1);
  check<StreamWeight::kE4m3>({5, 72, 144}, 1);
}

TEST(GroupedGemmBlock, Int4) {
  check<StreamWeight::kInt4>({5, 72, 144}, 1);
  check<StreamWeight::kInt4>({130, 264, 400, 1, false, true}, 1);
}

TEST(GroupedGemmBlock, Int4Experts) {
  check<StreamWeight::kInt4>({40, 80, 272, 4, true}, 2);
  check<StreamWeight::kInt4>({150, 288, 144, 3, true}, 2);
}

}  // namespace
}  // namespace flash_mla::sm90::grouped
