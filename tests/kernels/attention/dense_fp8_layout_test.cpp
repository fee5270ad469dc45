// The products of dense decode over FP8 caches on Hopper, played through on the CPU with the functions by which the
// kernel finds its bytes: what wgmma takes from which lane is the PTX manual's, everything else layout.h's.

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "kernels/attention/dense_fp8_decode/sm90/layout.h"

namespace flash_mla::sm90::dense_fp8 {
namespace {

constexpr int kSlice = 16, kHeads = 8;

/// Row (of 64) and k (of 16) of element `e` (of two) of register `r` (of four) of A.
struct Place {
  int row, k;
};
Place place_in_a(int warp, int lane, int r, int e) {
  return {16 * warp + lane / 4 + 8 * (r % 2), 2 * (lane % 4) + e + 8 * (r / 2)};
}

using Rows = std::vector<std::array<int, kHeadDim>>;
Rows random_rows(std::size_t count, unsigned seed) {
  std::mt19937 rng(seed);
  Rows rows(count);
  for (auto& row : rows) {
    for (int& x : row) x = std::uniform_int_distribution(-9, 9)(rng);
  }
  return rows;
}

TEST(DenseFp8Layout, ATilesKeysAreItsRows) {
  std::set<int> keys;
  for (int row = 0; row < kTileTokens; ++row) keys.insert(key_of_row(row));
  EXPECT_EQ(keys.size(), 64U);
  EXPECT_EQ(*keys.begin(), 0);
  EXPECT_EQ(*keys.rbegin(), 63);
}

TEST(DenseFp8Layout, KeysTimesQueriesAreScores) {
  const Rows keys = random_rows(kTileTokens, 1), queries = random_rows(kHeads, 2);
  // Q as convert_query leaves it.
  Rows reordered(kHeads);
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kHeadDim; ++c) {
      const int word = c % kChunkColumns / 2;
      reordered[static_cast<unsigned>(h)][static_cast<unsigned>(c)] =
          queries[static_cast<unsigned>(h)]
                 [static_cast<unsigned>(c / kChunkColumns * kChunkColumns + 2 * query_word(word) + c % 2)];
    }
  }
  std::vector<std::array<int, kHeads>> scores(kTileTokens);
  for (int slice = 0; slice < kHeadDim / kSlice; ++slice) {
    const int chunk = slice / 4, in_chunk = slice % 4;
    for (int warp = 0; warp < 4; ++warp) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int r = 0; r < 4; ++r) {
          for (int e = 0; e < 2; ++e) {
            const Place at = place_in_a(warp, lane, r, e);
            // key_fragments: word in_chunk of the lane's 16 elements of key r % 2, its lower or upper half.
            const int column = chunk * kChunkColumns + key_column(lane % 4) + 4 * in_chunk + 2 * (r / 2) + e;
            const int a = keys[static_cast<unsigned>(key_of_row(warp * 16 + lane / 4 + 8 * (r % 2)))]
                              [static_cast<unsigned>(column)];
            for (int h = 0; h < kHeads; ++h) {
              scores[static_cast<unsigned>(at.row)][static_cast<unsigned>(h)] +=
                  a * reordered[static_cast<unsigned>(h)][static_cast<unsigned>(slice * kSlice + at.k)];
            }
          }
        }
      }
    }
  }
  for (int row = 0; row < kTileTokens; ++row) {
    for (int h = 0; h < kHeads; ++h) {
      int expected = 0;
      for (unsigned c = 0; c < kHeadDim; ++c) {
        expected += keys[static_cast<unsigned>(key_of_row(row))][c] * queries[static_cast<unsigned>(h)][c];
      }
      ASSERT_EQ(scores[static_cast<unsigned>(row)][static_cast<unsigned>(h)], expected) << row << " " << h;
    }
  }
}

TEST(DenseFp8Layout, ValuesTimesWeightsAreOutputs) {
  const Rows keys = random_rows(kTileTokens, 3);
  // By head and row, as the softmax leaves it: the weight of key key_of_row(row).
  std::array<std::array<int, kTileTokens>, kHeads> weights{};
  std::mt19937 rng(4);
  for (auto& of_head : weights) {
    for (int& w : of_head) w = std::uniform_int_distribution(0, 9)(rng);
  }
  std::vector<std::array<int, kHeads>> out(kHeadDimV);
  std::vector<int> seen(kHeadDimV);
  for (int wg = 0; wg < 2; ++wg) {
    for (int product = 0; product < 4; ++product) {
      std::vector<std::array<int, kHeads>> d(64);
      for (int slice = 0; slice < kTileTokens / kSlice; ++slice) {
        for (int warp = 0; warp < 4; ++warp) {
          for (int lane = 0; lane < 32; ++lane) {
            for (int r = 0; r < 4; ++r) {
              for (int e = 0; e < 2; ++e) {
                const Place at = place_in_a(warp, lane, r, e);
                // value_fragments: of the lane's keys number 2 (r / 2) + e, column 2 product + r % 2.
                const int key = key_of_row(16 * slice + value_position(lane % 4, 2 * (r / 2) + e));
                const int column = value_column(wg, warp, lane / 4) + 2 * product + r % 2;
                for (int h = 0; h < kHeads; ++h) {
                  d[static_cast<unsigned>(at.row)][static_cast<unsigned>(h)] +=
                      keys[static_cast<unsigned>(key)][static_cast<unsigned>(column)] *
                      weights[static_cast<unsigned>(h)][static_cast<unsigned>(slice * kSlice + at.k)];
                }
              }
            }
          }
        }
      }
      // Epilogue: lane 4 g + t has rows g and g + 8, columns 2 product and 2 product + 1 of its eight.
      for (int warp = 0; warp < 4; ++warp) {
        for (int g = 0; g < 8; ++g) {
          for (int c = 0; c < 2; ++c) {
            const auto column = static_cast<unsigned>(value_column(wg, warp, g) + 2 * product + c);
            out[column] = d[static_cast<unsigned>(16 * warp + g + 8 * c)];
            ++seen[column];
          }
        }
      }
    }
  }
  for (unsigned column = 0; column < kHeadDimV; ++column) {
    ASSERT_EQ(seen[column], 1);
    for (unsigned h = 0; h < kHeads; ++h) {
      int expected = 0;
      for (int row = 0; row < kTileTokens; ++row) {
        expected +=
            keys[static_cast<unsigned>(key_of_row(row))][column] * weights[h][static_cast<unsigned>(row)];
      }
      ASSERT_EQ(out[column][h], expected) << column << " " << h;
    }
  }
}

/// Do `lanes` lanes that load `bytes` each, from the first one on, take different banks?
template <class Address>
bool is_free_of_conflicts(int bytes, Address&& address) {
  const int at_a_time = 128 / bytes;
  for (int first = 0; first < 32; first += at_a_time) {
    std::set<int> banks;
    for (int lane = first; lane < first + at_a_time; ++lane) {
      EXPECT_EQ(address(lane) % bytes, 0);
      for (int i = 0; i < bytes; i += 4) banks.insert((address(lane) + i) % 128 / 4);
    }
    if (banks.size() != 32) return false;
  }
  return true;
}

template <class Row>
void expect_no_conflicts() {
  for (int h = 0; h < 2; ++h) {
    EXPECT_TRUE(is_free_of_conflicts(
        16, [&](int lane) { return key_of_row(lane / 4 + 8 * h) * Row::kPitch + key_column(lane % 4); }));
  }
  for (int j = 0; j < 4; ++j) {
    EXPECT_TRUE(is_free_of_conflicts(8, [&](int lane) {
      return key_of_row(value_position(lane % 4, j)) * Row::kPitch + value_column(0, 0, lane / 4);
    }));
  }
}

TEST(DenseFp8Layout, LoadsHaveNoBankConflicts) {
  expect_no_conflicts<RowOf<KvFormat::kFp8V32>>();
  expect_no_conflicts<RowOf<KvFormat::kFp8Tensor>>();
}

TEST(DenseFp8Layout, RowsAndPartsAreAlignedForBulkCopies) {
  for (const int n : {RowOf<KvFormat::kFp8V32>::kBytes, RowOf<KvFormat::kFp8V32>::kPitch,
                      RowOf<KvFormat::kFp8V32>::kScaleOffset, RowOf<KvFormat::kFp8V32>::kRopeOffset,
                      RowOf<KvFormat::kFp8Tensor>::kBytes, RowOf<KvFormat::kFp8Tensor>::kPitch}) {
    EXPECT_EQ(n % 16, 0);
  }
  EXPECT_LE(RowOf<KvFormat::kFp8Tensor>::kPitch, kMaxPitch);
}

TEST(DenseFp8Layout, SumsOfAllHeadsAreKept) {
  const auto kept = [](auto group_of, int groups) {
    std::set<int> all;
    for (int g = 0; g < 8; ++g) all.insert(group_of(g));
    return static_cast<int>(all.size()) == groups && *all.rbegin() == groups - 1;
  };
  EXPECT_TRUE(kept(kept_group<16>, 2));
  EXPECT_TRUE(kept(kept_group<32>, 4));
  EXPECT_TRUE(kept(kept_group<64>, 8));
}

// Epilogue::store_partial against kFragment (dense_decode/sm90/params.h): lane l of a group of 8 columns has columns
// 2 (l % 4) and the next of rows l / 4 and l / 4 + 8.
TEST(DenseFp8Layout, PartialResultsLieAsCombineReadsThem) {
  std::set<int> places;
  for (int warp = 0; warp < 4; ++warp) {
    for (int g = 0; g < 8; ++g) {
      for (int t = 0; t < 4; ++t) {
        for (int b = 0; b < 2; ++b) {
          for (int i = 0; i < 4; ++i) {
            const int at = (warp * 8 + g) * 32 + 4 * (2 * t + b) + i, lane = at % 32, group = at / 32;
            EXPECT_EQ(lane / 4, 2 * t + b);  // of heads 8 n + 2 t + b, n = 0
            EXPECT_EQ(8 * group + 2 * (lane % 4), value_column(0, warp, g) + 2 * i);
            places.insert(at);
          }
        }
      }
    }
  }
  EXPECT_EQ(static_cast<int>(places.size()), kFragment);
}

TEST(DenseFp8Layout, HeadsCoverTheRows) {
  for (int rows = 1; rows <= kTileRows; ++rows) {
    EXPECT_GE(heads_for(rows), rows);
    EXPECT_EQ(heads_for(rows) % 16, 0);
  }
  EXPECT_EQ(heads_for(16), 16);
  EXPECT_EQ(heads_for(17), 32);
  EXPECT_EQ(heads_for(64), 64);
}

}  // namespace
}  // namespace flash_mla::sm90::dense_fp8
