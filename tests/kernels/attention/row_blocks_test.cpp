// How the Hopper backend places query rows: the divisions it replaces by products, on the host.

#include <gtest/gtest.h>

#include "kernels/attention/dense_decode/sm90/params.h"

namespace flash_mla::sm90 {
namespace {

TEST(RowBlocks, EveryRowIsPlacedAsDivisionWould) {
  for (int s_q = 1; s_q <= 64; ++s_q) {
    for (int group = 1; group <= 300; ++group) {
      const RowBlocks b = row_blocks(s_q, group);
      ASSERT_TRUE(b.divides_exactly()) << s_q << ' ' << group;
      for (int block = 0; block < b.count(); ++block) {
        for (const int row :
             {0, 1, b.heads - 1, b.heads % kTileRows, b.tokens * b.heads - 1, kTileRows - 1}) {
          const RowPlace place = place_of(b, block, row);
          ASSERT_EQ(place.token, block / b.head_chunks * b.tokens + row / b.heads) << s_q << ' ' << group;
          ASSERT_EQ(place.head, block % b.head_chunks * kTileRows + row % b.heads) << s_q << ' ' << group;
        }
      }
    }
  }
}

TEST(RowBlocks, ProductsThatWouldBeWrongAreKnown) {
  int wrong = 0;
  for (const int chunks : {1, 2, 3, 100, 129, 255, 257, 300, 1000, 4097, 16384, 40000}) {
    for (const int s_q : {1, 4, 16, 64}) {
      const RowBlocks b = row_blocks(s_q, chunks * kTileRows);
      bool right = true;
      for (int block = 0; block < b.count() && block < 1 << 16; ++block) {
        right = right && b.by_chunks(block) == block / b.head_chunks;
      }
      if (b.divides_exactly()) {
        EXPECT_TRUE(right) << chunks << ' ' << s_q;
      }
      wrong += !right;
    }
  }
  EXPECT_GT(wrong, 0) << "the cases no longer reach what divides_exactly() is for";
}

}  // namespace
}  // namespace flash_mla::sm90
