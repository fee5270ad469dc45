// A uniform plan against what it stands for: blocks on a line, cut at equal distances.

#include "schedule/uniform_plan.h"

#include <gtest/gtest.h>

namespace flash_mla {
namespace {

TEST(UniformPlan, PartsCoverEveryBlockOnceAndSplitsAreCounted) {
  for (const int batch : {1, 2, 3, 7, 64, 128, 300}) {
    for (const int blocks : {1, 2, 5, 10, 32, 33}) {
      for (const int parts : {1, 2, 3, 66, 132}) {
        for (const int percent : {0, 5}) {
          for (const int least_blocks : {1, 2}) {
            ScheduleOptions options;
            options.num_parts = parts;
            options.whole_requests_percent = percent;
            options.min_blocks_per_part = least_blocks;
            const UniformPlan plan = uniform_plan(batch, blocks, options);
            ASSERT_EQ(plan.blocks, blocks);
            std::vector<int> splits(static_cast<std::size_t>(batch));
            int at = 0;  // on the line
            for (int i = 0; i < parts; ++i) {
              const PartRange part = plan.part(i, batch);
              if (part.begin_req >= batch) {
                ASSERT_EQ(at, batch * blocks);
                ASSERT_LT(part.end_req, part.begin_req);
                continue;
              }
              ASSERT_EQ(part.begin_req * blocks + part.begin_block, at);
              ASSERT_EQ(plan.begin_split(part),
                        part.begin_block > 0 ? splits[static_cast<std::size_t>(part.begin_req)] : 0);
              for (int r = part.begin_req; r <= part.end_req; ++r) ++splits[static_cast<std::size_t>(r)];
              at = part.end_req * blocks + part.end_block;
            }
            ASSERT_EQ(at, batch * blocks) << batch << " " << blocks << " " << parts;
            int before = 0;
            for (int r = 0; r < batch; ++r) {
              ASSERT_EQ(plan.splits_before(r), before) << batch << " " << blocks << " " << parts << " " << r;
              before += splits[static_cast<std::size_t>(r)];
            }
            ASSERT_EQ(plan.splits_before(batch), before);
          }
        }
      }
    }
  }
}

TEST(UniformPlan, ThereIsNoneForFixedSplitsNoBlocksOrTooMany) {
  ScheduleOptions options;
  options.num_parts = 132;
  EXPECT_EQ(uniform_plan(4, 0, options).blocks, 0);
  EXPECT_EQ(uniform_plan(0, 4, options).blocks, 0);
  EXPECT_EQ(uniform_plan(1 << 16, 1 << 16, options).blocks, 0);
  options.fixed_split_blocks = 2;
  EXPECT_EQ(uniform_plan(4, 4, options).blocks, 0);
}

}  // namespace
}  // namespace flash_mla
