// How the sm90 backend cuts and launches a call: a pure function, checked without a GPU.

#include <gtest/gtest.h>

#include "sm90/decode/plan.h"

namespace flash_mla::sm90 {
namespace {

DecodePlan plan(int batch, int s_q, int h_q, int h_kv = 1, bool fixed_splits = false) {
  const RowBlocks blocks = row_blocks(s_q, h_q / h_kv);
  return plan_decode(batch, blocks, h_kv, num_parts(132, blocks, h_kv), fixed_splits);
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
    return schedule_shape(batch, 132, blocks, 1).fixed_overhead_blocks;
  };
  EXPECT_EQ(overhead(0), 4) << "not known";
  EXPECT_EQ(overhead(1), 0);
  EXPECT_EQ(overhead(33), 0);
  EXPECT_EQ(overhead(34), 4);
}

TEST(DecodePlan, ClustersTakePairsOfTilesWhereTheBatchIsSmall) {
  EXPECT_EQ(schedule_shape(4, 132, row_blocks(1, 128), 1).min_blocks_per_part, 2);
  EXPECT_EQ(schedule_shape(4, 132, row_blocks(1, 64), 1).min_blocks_per_part, 1);
  EXPECT_EQ(schedule_shape(128, 132, row_blocks(1, 128), 1).min_blocks_per_part, 1);
}

TEST(DecodePlan, ASingleMemoryBoundRequestLeavesRoomForCombine) {
  EXPECT_EQ(schedule_shape(1, 132, row_blocks(1, 16), 1).num_parts, 110);
  EXPECT_EQ(schedule_shape(2, 132, row_blocks(1, 16), 1).num_parts, 132);
  EXPECT_EQ(schedule_shape(1, 132, row_blocks(1, 128), 1).num_parts, 66);
  EXPECT_EQ(schedule_shape(1, 132, row_blocks(1, 16), 8).num_parts, 16);
  EXPECT_EQ(schedule_shape(1, 1, row_blocks(1, 16), 1).num_parts, 1) << "never none";
}

TEST(DecodePlan, CombineIsAsFineAsItsBlocksAreFew) {
  EXPECT_EQ(plan(1, 1, 16).combine, CombineShape::kFine);
  EXPECT_EQ(plan(4, 1, 128).combine, CombineShape::kMedium);
  EXPECT_EQ(plan(128, 1, 128).combine, CombineShape::kCoarse);
  const DecodePlan p = plan(4, 1, 128);
  EXPECT_EQ(p.combine_grid.x, 8);
  EXPECT_EQ(p.combine_grid.y, 2 * 2 * 4);  // halves of the columns, row blocks, groups of 16 rows
  EXPECT_EQ(p.combine_grid.z, 4);
}

TEST(DecodePlan, WithFixedSplitsTheShapeOfCombineDependsOnNothing) {
  for (const int batch : {1, 4, 128, 1000}) {
    const DecodePlan p = plan(batch, 1, 16, 1, true);
    EXPECT_EQ(p.combine, CombineShape::kMedium);
    EXPECT_EQ(p.combine_grid.z, batch);
    EXPECT_TRUE(p.combines);
  }
}

TEST(DecodePlan, OnePartCombinesNothing) {
  EXPECT_FALSE(plan_decode(1, row_blocks(1, 16), 1, 1, false).combines);
  EXPECT_TRUE(plan_decode(1, row_blocks(1, 16), 1, 1, true).combines);
}

}  // namespace
}  // namespace flash_mla::sm90
