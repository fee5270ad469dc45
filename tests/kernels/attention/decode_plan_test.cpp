// How the sm90 backend cuts and launches a call: a pure function, checked without a GPU.

#include <gtest/gtest.h>

#include "kernels/attention/dense_decode/sm90/plan.h"

namespace flash_mla::sm90 {
namespace {

DecodePlan plan(int batch, int s_q, int h_q, int h_kv = 1, bool fixed_splits = false) {
  const RowBlocks blocks = row_blocks(s_q, h_q / h_kv);
  return plan_decode(batch, 132, blocks, h_kv, num_parts(132, blocks, h_kv), fixed_splits);
}

TEST(DecodePlan, TheGridHasAGroupOfCtasForEveryPart) {
  const DecodePlan p = plan(128, 2, 128, 2);
  EXPECT_EQ(p.blocks.count(), 2);  // two tokens x 64 heads of a latent head
  EXPECT_EQ(p.grid.x, 2);
  EXPECT_EQ(p.grid.y, 2);
  EXPECT_EQ(p.grid.z, 33);
  EXPECT_EQ(num_parts(132, row_blocks(16, 1024), 8), 1) << "more CTAs than multiprocessors are one part";
}

TEST(DecodePlan, EvenNumbersOfRowBlocksShareTheirKeys) {
  EXPECT_EQ(plan(1, 1, 128).cluster, 2);
  EXPECT_EQ(plan(1, 1, 64).cluster, 1);
  EXPECT_EQ(plan(1, 3, 64).cluster, 1);
  EXPECT_EQ(plan(1, 4, 64).cluster, 2);
}

TEST(DecodePlan, WorkOfTwoRowBlocksPerKeyIsComputeBound) {
  EXPECT_FALSE(compute_bound(row_blocks(1, 64)));
  EXPECT_FALSE(compute_bound(row_blocks(4, 16)));
  EXPECT_TRUE(compute_bound(row_blocks(1, 65)));
  EXPECT_TRUE(compute_bound(row_blocks(8, 16)));
}

TEST(DecodePlan, ASmallBatchPaysNothingForARequest) {
  const RowBlocks blocks = row_blocks(1, 128);
  const auto overhead = [&](int batch) {
    return schedule_options(batch, 132, blocks, 1).fixed_overhead_blocks;
  };
  EXPECT_EQ(overhead(0), 4) << "not known";
  EXPECT_EQ(overhead(1), 0);
  EXPECT_EQ(overhead(33), 0);
  EXPECT_EQ(overhead(34), 4);
}

TEST(DecodePlan, AScheduleHasAsManyPartsWhateverTheBatch) {
  for (const int h_q : {16, 128}) {
    const RowBlocks blocks = row_blocks(1, h_q);
    for (const int batch : {1, 2, 33, 34, 128}) {
      EXPECT_EQ(schedule_options(batch, 132, blocks, 1).num_parts,
                schedule_options(0, 132, blocks, 1).num_parts);
    }
  }
}

TEST(DecodePlan, AGroupOfCtasForEveryPartRunsAtATime) {
  EXPECT_EQ(schedule_options(2, 132, row_blocks(1, 16), 1).num_parts, 132);
  EXPECT_EQ(schedule_options(1, 132, row_blocks(1, 128), 1).num_parts, 66);
  EXPECT_EQ(schedule_options(1, 132, row_blocks(1, 16), 8).num_parts, 16);
  EXPECT_EQ(schedule_options(1, 1, row_blocks(1, 16), 1).num_parts, 1) << "never none";
}

TEST(DecodePlan, ClustersTakePairsOfTilesWhereTheBatchIsSmall) {
  EXPECT_EQ(schedule_options(4, 132, row_blocks(1, 128), 1).min_blocks_per_part, 2);
  EXPECT_EQ(schedule_options(4, 132, row_blocks(1, 64), 1).min_blocks_per_part, 1);
  EXPECT_EQ(schedule_options(128, 132, row_blocks(1, 128), 1).min_blocks_per_part, 1);
}

TEST(DecodePlan, CombineIsAsFineAsItsBlocksRunAtOnce) {
  const auto count = [](const DecodePlan& p) {
    return p.combine_grid.x * p.combine_grid.y * p.combine_grid.z;
  };
  EXPECT_EQ(plan(1, 1, 16).combine, kCombineShapes.front());
  EXPECT_EQ(plan(128, 1, 128).combine, kCombineShapes.back());
  for (const int batch : {1, 2, 4, 8}) {
    for (const int h_q : {1, 16, 64, 128}) {
      const DecodePlan p = plan(batch, 1, h_q);
      if (p.combine == kCombineShapes.back()) continue;
      EXPECT_LE(count(p), 132) << batch << " " << h_q;
      if (p.combine == kCombineShapes.front()) continue;
      EXPECT_GT(2 * count(p), 132) << batch << " " << h_q;
    }
  }
  const DecodePlan p = plan(4, 1, 128);
  EXPECT_EQ(p.combine_grid.x, 2);
  EXPECT_EQ(p.combine_grid.y, 2 * 2 * 4);  // halves of the columns, row blocks, groups of 16 rows
  EXPECT_EQ(p.combine_grid.z, 4);
}

TEST(DecodePlan, CombineSpreadsOverAllMultiprocessors) {
  const auto fit = [](const DecodePlan& p) {
    EXPECT_EQ(p.combine_smem % kSmemUnit, 0U);
    return kSmemPerSm / (p.combine_smem + kSmemReserved);
  };
  EXPECT_EQ(fit(plan(1, 1, 16)), 1U);
  EXPECT_EQ(fit(plan(4, 1, 128)), 1U);
  EXPECT_EQ(fit(plan(16, 1, 128)), 2U);
  EXPECT_EQ(fit(plan(36, 1, 128)), 5U);
  EXPECT_EQ(fit(plan(128, 1, 128)), 8U);
  for (const int batch : {1, 3, 16, 100, 1000}) {
    EXPECT_LE(plan(batch, 1, 128).combine_smem, kMaxSmem);
    EXPECT_LE(plan(batch, 1, 128, 1, true).combine_smem, kMaxSmem);
  }
}

TEST(DecodePlan, WithFixedSplitsTheShapeOfCombineDependsOnNothing) {
  for (const int batch : {1, 4, 128, 1000}) {
    const DecodePlan p = plan(batch, 1, 16, 1, true);
    EXPECT_EQ(p.combine, kFixedCombineShape);
    EXPECT_EQ(p.combine_grid.z, batch);
    EXPECT_TRUE(p.combines);
  }
}

TEST(DecodePlan, OnePartCombinesNothing) {
  EXPECT_FALSE(plan_decode(1, 132, row_blocks(1, 16), 1, 1, false).combines);
  EXPECT_TRUE(plan_decode(1, 132, row_blocks(1, 16), 1, 1, true).combines);
}

}  // namespace
}  // namespace flash_mla::sm90
