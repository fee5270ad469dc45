#include "flash_mla/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla {
namespace {

using Row = std::vector<std::int32_t>;

std::vector<Row> block_rows(const DecodeSchedule& s) {
  std::vector<Row> rows;
  for (const DecodePart& p : s.parts()) {
    rows.push_back({p.begin_req, p.end_req, p.begin_block, p.end_block, p.begin_split, p.first_is_split,
                    p.last_is_split});
  }
  return rows;
}

ScheduleOptions with_parts(int parts, int min_blocks = 1) {
  ScheduleOptions o;
  o.num_parts = parts;
  o.min_blocks_per_request = min_blocks;
  return o;
}

TEST(Schedule, FourParts) {
  const auto s = DecodeSchedule::build(std::vector<std::int32_t>{20, 140, 4096, 65}, with_parts(4));
  EXPECT_EQ(s.payload_blocks(), 28);
  EXPECT_EQ(
      block_rows(s),
      (std::vector<Row>{
          {0, 2, 0, 9, 0, 0, 1}, {2, 2, 9, 32, 1, 1, 1}, {2, 2, 32, 55, 2, 1, 1}, {2, 3, 55, 2, 3, 1, 0}}));
}

TEST(Schedule, TokenRows) {
  const std::vector<std::int32_t> lengths{20, 140, 4096, 65};
  const auto s = DecodeSchedule::build(lengths, with_parts(66, 0));
  EXPECT_EQ(s.payload_blocks(), 7);
  EXPECT_EQ(Row(s.num_splits().begin(), s.num_splits().end()), (Row{0, 1, 3, 35, 36}));
  const Row flat = s.to_token_rows(lengths);
  const auto row = [&](std::size_t i) { return Row(flat.begin() + 8 * i, flat.begin() + 8 * i + 8); };
  EXPECT_EQ(row(0), (Row{0, 0, 0, 20, 0, 0, 0, 0}));
  EXPECT_EQ(row(1), (Row{1, 0, 1, 128, 0, 0, 0, 0}));
  EXPECT_EQ(row(2), (Row{1, 128, 1, 140, 1, 0, 0, 0}));
  EXPECT_EQ(row(4), (Row{2, 128, 2, 256, 1, 0, 0, 0}));
  EXPECT_EQ(row(65), (Row{4, 0, 3, 65, 0, 0, 0, 0}));
}

TEST(Schedule, EmptyRequests) {
  const std::vector<std::int32_t> lengths{0, 64, 0, 129};
  EXPECT_EQ(DecodeSchedule::build(lengths, with_parts(8, 0)).payload_blocks(), 8);
  const auto s = DecodeSchedule::build(lengths, with_parts(8, 1));
  EXPECT_EQ(s.payload_blocks(), 9);
  EXPECT_EQ(Row(s.num_splits().begin(), s.num_splits().end()), (Row{0, 1, 2, 3, 4}));
  const std::vector<Row> rows = block_rows(s);
  EXPECT_EQ(rows[0], (Row{0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(rows[1], (Row{1, 1, 0, 1, 0, 0, 0}));
  EXPECT_EQ(rows[2], (Row{2, 2, 0, 0, 0, 0, 0}));
  EXPECT_EQ(rows[3], (Row{3, 3, 0, 3, 0, 0, 0}));
}

TEST(Schedule, NoRequests) {
  const auto s = DecodeSchedule::build({}, with_parts(3));
  EXPECT_EQ(s.num_splits().size(), 1u);
  for (const DecodePart& p : s.parts()) EXPECT_GT(p.begin_req, p.end_req);
}

// Walks the parts and checks that they cover every block of every request once, in order.
void expect_exact_cover(const std::vector<std::int32_t>& lengths, const ScheduleOptions& o) {
  const auto s = DecodeSchedule::build(lengths, o);
  const auto blocks_of = [&](std::size_t r) {
    return (std::int64_t{lengths[r]} + o.block_size - 1) / o.block_size;
  };
  std::size_t req = 0;
  std::int64_t block = 0, split = 0, split_total = 0;
  for (const DecodePart& p : s.parts()) {
    if (p.begin_req > p.end_req || static_cast<std::size_t>(p.begin_req) >= lengths.size()) continue;
    ASSERT_EQ(static_cast<std::size_t>(p.begin_req), req);
    ASSERT_EQ(p.begin_block, block);
    ASSERT_EQ(p.begin_split, split);
    for (; req <= static_cast<std::size_t>(p.end_req); ++req) {
      const bool is_last = req == static_cast<std::size_t>(p.end_req);
      const std::int64_t stop = is_last ? p.end_block : blocks_of(req);
      ASSERT_TRUE(stop > block || blocks_of(req) == 0);
      ASSERT_LE(stop, blocks_of(req));
      split +=
          o.fixed_split_blocks > 0
              ? std::max<std::int64_t>((stop - block + o.fixed_split_blocks - 1) / o.fixed_split_blocks, 1)
              : 1;
      if (stop < blocks_of(req)) {
        ASSERT_TRUE(is_last);
        if (o.fixed_split_blocks > 0) {
          ASSERT_EQ(stop % o.fixed_split_blocks, 0);
        }
        block = stop;
        break;
      }
      ASSERT_EQ(s.num_splits()[req + 1] - s.num_splits()[req], split);
      if (split > 1) split_total += split;
      block = split = 0;
    }
  }
  ASSERT_EQ(req, lengths.size());
  ASSERT_EQ(block, 0);
  if (o.fixed_split_blocks == 0) {
    ASSERT_LE(split_total, 2 * o.num_parts);
  }
}

TEST(Schedule, EveryBlockIsInExactlyOnePart) {
  std::mt19937 rng(7);
  for (int i = 0; i < 10000; ++i) {
    const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    // Mostly small batches, now and then up to 4096 requests.
    std::vector<std::int32_t> lengths(static_cast<std::size_t>(draw(0, i % 100 == 0 ? 4096 : 40)));
    const int longest = 1 << draw(0, 17);
    for (std::int32_t& x : lengths) x = draw(0, std::min(longest, 131072));
    ScheduleOptions o;
    o.num_parts = draw(1, 140);
    o.fixed_overhead_blocks = draw(0, 6);
    o.min_blocks_per_request = draw(0, 1);
    o.fixed_split_blocks = draw(0, 2) == 0 ? draw(1, 64) : 0;
    o.min_blocks_per_part = draw(0, 1) == 0 ? 1 : draw(1, 20);
    o.whole_requests_percent = draw(0, 1) == 0 ? 0 : draw(1, 200);
    expect_exact_cover(lengths, o);
    if (HasFatalFailure()) FAIL() << "case " << i;
  }
}

TEST(Schedule, NoPartIsSmallerThanAsked) {
  ScheduleOptions o = with_parts(66);
  o.fixed_overhead_blocks = 0;
  o.min_blocks_per_part = 2;
  const auto s = DecodeSchedule::build(std::vector<std::int32_t>{64 * 64}, o);
  EXPECT_EQ(s.payload_blocks(), 2);
  EXPECT_EQ(s.num_splits()[1], 32);
  o.min_blocks_per_part = 1 << 16;
  EXPECT_EQ(DecodeSchedule::build(std::vector<std::int32_t>{64 * 64, 7}, o).num_splits()[2], 2) << "one part";
  EXPECT_EQ(DecodeSchedule::build(std::vector<std::int32_t>{}, o).num_splits().size(), 1U);
}

TEST(Schedule, RequestsStayWholeWhereThatIsBalancedEnough) {
  ScheduleOptions o = with_parts(66);
  o.fixed_overhead_blocks = 4;
  const auto splits = [&](int percent, std::vector<std::int32_t> lengths) {
    o.whole_requests_percent = percent;
    return DecodeSchedule::build(lengths, o).num_splits().back();
  };
  std::vector<std::int32_t> lengths(128, 8192);
  EXPECT_GT(splits(0, lengths), 128);
  EXPECT_GT(splits(3, lengths), 128) << "two for every part are 3.03% more than 128 for 66 parts";
  EXPECT_EQ(splits(4, lengths), 128);
  lengths[5] = 8000;
  EXPECT_EQ(splits(4, lengths), 128) << "a little shorter";
  lengths[5] = 9000;
  EXPECT_GT(splits(4, lengths), 128) << "one is longer by 10%";
  EXPECT_EQ(splits(14, lengths), 128);
}

TEST(Schedule, FixedSplitsDependOnTheRequestAlone) {
  ScheduleOptions o = with_parts(5);
  o.fixed_split_blocks = 4;
  const auto alone = DecodeSchedule::build(std::vector<std::int32_t>{5000}, o);
  const auto among = DecodeSchedule::build(std::vector<std::int32_t>{70000, 5000, 3, 0}, o);
  EXPECT_EQ(alone.num_splits()[1], among.num_splits()[2] - among.num_splits()[1]);
}

TEST(Schedule, TheLongestRequestsStayWithinInt32) {
  constexpr std::int32_t kLongest = std::numeric_limits<std::int32_t>::max();
  for (const int block_size : {64, 1 << 30, kLongest}) {
    ScheduleOptions o = with_parts(3, 0);
    o.block_size = block_size;
    const std::vector<std::int32_t> lengths{kLongest};
    const auto s = DecodeSchedule::build(lengths, o);
    const Row rows = s.to_token_rows(lengths);
    const auto last =
        static_cast<std::size_t>(std::find_if(s.parts().begin(), s.parts().end(),
                                              [](const DecodePart& p) { return p.begin_req == 1; }) -
                                 s.parts().begin() - 1);
    EXPECT_EQ(rows[8 * last + 3], kLongest) << block_size;
  }
  ScheduleOptions o = with_parts(kLongest - 2, 0);
  std::vector<DecodePart> parts(1);
  std::vector<std::int32_t> splits(4);
  EXPECT_THROW(build_decode_schedule(std::vector<std::int32_t>{0, 0, 0}, o, parts, splits), InvalidArgument);
  o = with_parts(1);
  o.block_size = 1;
  o.fixed_overhead_blocks = 0;
  EXPECT_THROW(DecodeSchedule::build(std::vector<std::int32_t>{kLongest}, o), InvalidArgument);
  o.block_size = 2;
  o.fixed_overhead_blocks = kLongest;
  EXPECT_THROW(DecodeSchedule::build(std::vector<std::int32_t>{1, 1}, o), InvalidArgument);
}

TEST(Schedule, BadInputIsNamed) {
  const auto message = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "nothing thrown";
  };
  const std::vector<std::int32_t> lengths{5, -3};
  EXPECT_EQ(message([&] { DecodeSchedule::build(lengths, with_parts(1)); }),
            "cache_seqlens[1] is -3, expected >= 0");
  EXPECT_EQ(message([&] { DecodeSchedule::build({}, with_parts(0)); }), "num_parts is 0, expected >= 1");
  std::vector<DecodePart> parts(2);
  std::vector<std::int32_t> splits(9);
  EXPECT_NE(
      message([&] { build_decode_schedule({}, with_parts(3), parts, splits); }).find("parts has 2 rows"),
      std::string::npos);
  EXPECT_NE(
      message([&] { build_decode_schedule({}, with_parts(2), parts, splits); }).find("num_splits has 9"),
      std::string::npos);
}

TEST(Schedule, BalanceIsTheShareOfWorkThatTheBusiestPartLeavesToOthers) {
  ScheduleOptions o = with_parts(2);
  o.fixed_overhead_blocks = 0;
  const std::vector<std::int32_t> even{640}, odd{64 * 3}, none{0, 0};
  EXPECT_EQ(DecodeSchedule::build(even, o).balance(even), 1.0);
  EXPECT_EQ(DecodeSchedule::build(odd, o).balance(odd), 0.75) << "two blocks and one";
  EXPECT_EQ(DecodeSchedule::build(none, o).balance(none), 0.0);
  o.fixed_split_blocks = 2;
  EXPECT_EQ(DecodeSchedule::build(even, o).balance(even), 10.0 / (2 * 6)) << "cut at multiples of two";
  EXPECT_THROW(DecodeSchedule::build(even, o).balance(none), InvalidArgument);
}

TEST(Schedule, EveryOptionHasBoundsAndIsNamedWhenOutOfThem) {
  for (const ScheduleOptionField& field : schedule_option_fields()) {
    const int by_default = ScheduleOptions{}.*field.value;
    EXPECT_GE(by_default, field.least) << field.name;
    EXPECT_LE(by_default, field.most) << field.name;
    ScheduleOptions o;
    o.*field.value = field.least - 1;
    try {
      DecodeSchedule::build(std::vector<std::int32_t>{1}, o);
      ADD_FAILURE() << field.name;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(std::string(e.what()).find(field.name), 0U) << e.what();
    }
  }
}

}  // namespace
}  // namespace flash_mla
