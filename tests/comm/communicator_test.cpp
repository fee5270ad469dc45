// Every backend of a communicator: what the calls give, in which order sums are taken, and how a group ends when one
// of its ranks does.

#include "comm/communicator.h"

#include <gmock/gmock.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "base/element.h"
#include "comm/thread_group.h"
#include "flash_mla/error.h"

namespace flash_mla::comm {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;

/// rows x columns of T, in rows that are `gap` elements longer.
template <class T>
struct Table {
  Table(std::int64_t num_rows, std::int64_t num_columns, std::int64_t gap = 0)
      : rows(num_rows),
        columns(num_columns),
        stride(num_columns + gap),
        values(static_cast<std::size_t>(num_rows * (num_columns + gap)) + 1, T(77)) {}
  T& at(std::int64_t row, std::int64_t column) {
    return values[static_cast<std::size_t>(row * stride + column)];
  }
  Matrix matrix() {
    const DType dtype = std::is_same_v<T, float>          ? DType::kFloat32
                        : std::is_same_v<T, std::int32_t> ? DType::kInt32
                                                          : DType::kBFloat16;
    return {reinterpret_cast<std::byte*>(values.data()), dtype, rows, columns, stride};
  }
  std::int64_t rows, columns, stride;
  std::vector<T> values;
};

/// f(communicator) on `size` threads; what each threw, "" if nothing.
std::vector<std::string> on_ranks(std::int64_t ranks, const std::function<void(Communicator&)>& f,
                                  std::chrono::milliseconds timeout = kTimeout) {
  const int size = static_cast<int>(ranks);
  ThreadGroup group(size, timeout);
  std::vector<std::string> errors(static_cast<std::size_t>(size));
  std::vector<std::jthread> threads;
  threads.reserve(errors.size());
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const auto communicator = group.communicator(rank);
      try {
        f(*communicator);
      } catch (const RankError& e) {
        errors[static_cast<std::size_t>(rank)] = e.what();
      }
    });
  }
  threads.clear();
  return errors;
}

void all_well(const std::vector<std::string>& errors) {
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

float value(int rank, std::int64_t row, std::int64_t column) {
  return static_cast<float>(rank + 1) * 0.1f + static_cast<float>(row) * 1.7f -
         static_cast<float>(column) / 3;
}

std::int64_t rank_of(const Communicator& c) { return c.rank(); }

class OnRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, OnRanks, testing::Values(1, 2, 3, 8));

TEST_P(OnRanks, SumsAreTakenInTheOrderOfTheRanks) {
  const std::int64_t size = GetParam();
  all_well(on_ranks(size, [&](Communicator& c) {
    Table<float> x(7, 1111, 5);  // windows
    for (std::int64_t r = 0; r < 7; ++r)
      for (std::int64_t i = 0; i < 1111; ++i) x.at(r, i) = value(c.rank(), r, i);
    c.all_reduce(x.matrix());
    for (std::int64_t r = 0; r < 7; ++r) {
      for (std::int64_t i = 0; i < 1111; ++i) {
        float sum = value(0, r, i);
        for (int other = 1; other < size; ++other) sum += value(other, r, i);
        ASSERT_EQ(x.at(r, i), sum) << "to the bit, at " << r << ", " << i;
      }
      EXPECT_EQ(x.values[static_cast<std::size_t>(r * 1116 + 1112) * (r < 6)], r < 6 ? 77 : x.at(0, 0))
          << "between the rows";
    }
  }));
}

TEST_P(OnRanks, SumsOfBfloat16AreRoundedOnce) {
  const std::int64_t size = GetParam();
  all_well(on_ranks(size, [&](Communicator& c) {
    Table<std::uint16_t> x(3, 70);
    for (std::int64_t r = 0; r < 3; ++r)
      for (std::int64_t i = 0; i < 70; ++i) x.at(r, i) = to_bf16(value(c.rank(), r, i)).bits;
    c.all_reduce(x.matrix());
    for (std::int64_t r = 0; r < 3; ++r) {
      for (std::int64_t i = 0; i < 70; ++i) {
        float sum = to_float(to_bf16(value(0, r, i)));
        for (int other = 1; other < size; ++other) sum += to_float(to_bf16(value(other, r, i)));
        ASSERT_EQ(x.at(r, i), to_bf16(sum).bits);
      }
    }
  }));
}

TEST_P(OnRanks, GathersInPlaceAndElsewhere) {
  const std::int64_t size = GetParam();
  all_well(on_ranks(size, [&](Communicator& c) {
    Table<std::int32_t> in(2, 3, 1), out(2 * size, 3), whole(2 * size, 3, 2);
    for (std::int64_t r = 0; r < 2; ++r) {
      for (std::int64_t i = 0; i < 3; ++i) {
        const auto x = static_cast<std::int32_t>(rank_of(c) * 100 + r * 10 + i);
        in.at(r, i) = x;
        whole.at(2 * rank_of(c) + r, i) = x;
      }
    }
    c.all_gather(in.matrix(), out.matrix());
    c.all_gather(whole.matrix().row_range(2 * rank_of(c), 2), whole.matrix());
    for (std::int64_t r = 0; r < 2 * size; ++r) {
      for (std::int64_t i = 0; i < 3; ++i) {
        ASSERT_EQ(out.at(r, i), r / 2 * 100 + r % 2 * 10 + i);
        ASSERT_EQ(whole.at(r, i), out.at(r, i));
      }
    }
  }));
}

TEST_P(OnRanks, ReduceScatterIsASliceOfAllReduce) {
  const std::int64_t size = GetParam();
  all_well(on_ranks(size, [&](Communicator& c) {
    Table<float> in(4 * size, 33, 1), out(4, 33), sum(4 * size, 33);
    for (std::int64_t r = 0; r < in.rows; ++r)
      for (std::int64_t i = 0; i < 33; ++i) sum.at(r, i) = in.at(r, i) = value(c.rank(), r, i);
    c.reduce_scatter(in.matrix(), out.matrix());
    c.all_reduce(sum.matrix());
    for (std::int64_t r = 0; r < 4; ++r)
      for (std::int64_t i = 0; i < 33; ++i) ASSERT_EQ(out.at(r, i), sum.at(4 * rank_of(c) + r, i));
  }));
}

TEST_P(OnRanks, AllToAllSendsAsManyRowsAsSaidAndNoneToo) {
  const std::int64_t size = GetParam();
  const auto rows = [](int from, int to) { return std::int64_t{(from * 3 + to * 2) % 4}; };
  all_well(on_ranks(size, [&](Communicator& c) {
    std::vector<std::int64_t> to, from;
    for (int r = 0; r < size; ++r) {
      to.push_back(rows(c.rank(), r));
      from.push_back(rows(r, c.rank()));
    }
    Table<float> in(std::accumulate(to.begin(), to.end(), std::int64_t{0}), 5, 2);
    Table<float> out(std::accumulate(from.begin(), from.end(), std::int64_t{0}), 5);
    std::int64_t at = 0;
    for (int r = 0; r < size; ++r) {
      for (std::int64_t i = 0; i < rows(c.rank(), r); ++i, ++at) {
        for (std::int64_t k = 0; k < 5; ++k)
          in.at(at, k) = static_cast<float>(rank_of(c) * 1000 + std::int64_t{r} * 100 + i * 10 + k);
      }
    }
    c.all_to_all_v(in.matrix(), to, out.matrix(), from);
    at = 0;
    for (int r = 0; r < size; ++r) {
      for (std::int64_t i = 0; i < rows(r, c.rank()); ++i, ++at) {
        for (std::int64_t k = 0; k < 5; ++k)
          ASSERT_EQ(out.at(at, k),
                    static_cast<float>(std::int64_t{r} * 1000 + rank_of(c) * 100 + i * 10 + k));
      }
    }
  }));
}

TEST_P(OnRanks, BroadcastsFromAnyRank) {
  const std::int64_t size = GetParam();
  all_well(on_ranks(size, [&](Communicator& c) {
    for (int root = 0; root < size; ++root) {
      Table<std::int32_t> x(3, 4, 1);
      std::ranges::fill(x.values, c.rank() * 10 + root);
      c.broadcast(x.matrix(), root);
      for (std::int64_t r = 0; r < 3; ++r)
        for (std::int64_t i = 0; i < 4; ++i) ASSERT_EQ(x.at(r, i), root * 11);
    }
  }));
}

// Calls one after another without a pause, of changing kinds and sizes, no rows among them.
TEST_P(OnRanks, ManyCallsFollowEachOther) {
  const std::int64_t size = GetParam();
  all_well(on_ranks(size, [&](Communicator& c) {
    std::mt19937 same(5);  // on every rank
    for (int i = 0; i < 300; ++i) {
      const std::int64_t rows = static_cast<std::int64_t>(same() % 4), columns = 1 + same() % 40;
      if (same() % 2 == 0) {
        Table<float> x(rows, columns);
        std::ranges::fill(x.values, 1.0f);
        c.all_reduce(x.matrix());
        for (std::int64_t k = 0; k < rows * columns; ++k)
          ASSERT_EQ(x.values[static_cast<std::size_t>(k)], static_cast<float>(size));
      } else {
        Table<float> in(rows, columns), out(rows * size, columns);
        std::ranges::fill(in.values, static_cast<float>(c.rank()));
        c.all_gather(in.matrix(), out.matrix());
        for (std::int64_t r = 0; r < out.rows; ++r) {
          const std::int64_t sender = r / rows;
          ASSERT_EQ(out.at(r, 0), static_cast<float>(sender));
        }
      }
    }
    EXPECT_EQ(c.traffic().calls, 300);
    EXPECT_EQ(c.traffic().bytes > 0, size > 1);
  }));
}

// A rank ends at a random moment, twenty times: all others hear its name and reason at once.
TEST(Failure, OfOneRankIsToldToAllOthers) {
  std::mt19937 random(3);
  for (int i = 0; i < 20; ++i) {
    const int failing = static_cast<int>(random() % 4);
    const int calls = static_cast<int>(random() % 30);
    const auto begin = std::chrono::steady_clock::now();
    const auto errors = on_ranks(4, [&](Communicator& c) {
      Table<float> x(2, 50);
      for (int k = 0; k < 1000; ++k) {
        if (c.rank() == failing && k == calls) return c.fail("out of memory");
        c.all_reduce(x.matrix());
      }
    });
    EXPECT_LT(std::chrono::steady_clock::now() - begin, 20s);
    for (int r = 0; r < 4; ++r) {
      EXPECT_EQ(errors[static_cast<std::size_t>(r)],
                r == failing ? "" : "rank " + std::to_string(failing) + ": out of memory");
    }
  }
}

TEST(Failure, OfARankThatDoesNotComeIsATimeOut) {
  const auto errors = on_ranks(
      3,
      [&](Communicator& c) {
        Table<float> x(2, 50);
        c.all_reduce(x.matrix());
        if (c.rank() == 1) return;
        c.all_reduce(x.matrix());
      },
      3s);  // long enough for the others on a busy machine
  EXPECT_EQ(errors[1], "");
  for (const int r : {0, 2})
    EXPECT_EQ(errors[static_cast<std::size_t>(r)],
              "rank 1: has not come to all_reduce of 50 float32 x 2 rows within 3000 ms");
}

TEST(Failure, OfRanksThatAskForDifferentThingsNamesBoth) {
  const auto errors = on_ranks(3, [&](Communicator& c) {
    Table<float> x(c.rank() == 2 ? 3 : 2, 50);
    c.all_reduce(x.matrix());
  });
  for (const std::string& error : errors)
    EXPECT_EQ(
        error,
        "rank 2: calls all_reduce of 50 float32 x 3 rows, where rank 0 calls all_reduce of 50 float32 x 2 rows");

  const auto counts = on_ranks(2, [&](Communicator& c) {
    Table<float> in(2, 4), out(c.rank() == 0 ? 2 : 3, 4);
    const std::vector<std::int64_t> to = {1, 1};
    const std::vector<std::int64_t> from = c.rank() == 0 ? to : std::vector<std::int64_t>{2, 1};
    c.all_to_all_v(in.matrix(), to, out.matrix(), from);
  });
  for (const std::string& error : counts)
    EXPECT_EQ(error, "rank 1: expects 2 rows of rank 0 in all_to_all_v, which sends 1");
}

TEST(Failure, IsForgottenByAReset) {
  ThreadGroup group(2);
  const auto a = group.communicator(0), b = group.communicator(1);
  Table<float> x(1, 4), y(1, 4);
  b->fail("gone");
  EXPECT_THROW(a->all_reduce(x.matrix()), RankError);
  group.reset();
  std::jthread other([&] { b->all_reduce(y.matrix()); });
  a->all_reduce(x.matrix());
  EXPECT_EQ(x.at(0, 0), 154);
}

template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(Arguments, AreRefusedBeforeAnybodyWaits) {
  EXPECT_THAT(refusal([] { ThreadGroup group(0); }), HasSubstr("size is 0"));
  ThreadGroup group(2);
  EXPECT_THAT(refusal([&] { group.communicator(2); }), HasSubstr("rank is 2, expected 0 to 1"));
  const auto c = group.communicator(0);
  Table<float> x(2, 4), y(3, 4);
  Table<std::int32_t> ids(2, 4);
  const std::vector<std::int64_t> one = {2}, two = {1, 1}, less = {1, -1}, more = {2, 2}, uneven = {2, 0};
  EXPECT_THAT(refusal([&] { c->all_reduce(ids.matrix()); }), HasSubstr("inout is int32"));
  EXPECT_THAT(refusal([&] { c->all_gather(x.matrix(), y.matrix()); }),
              HasSubstr("out is (3, 4) float32, expected 2 times the rows of in, (2, 4) float32"));
  EXPECT_THAT(refusal([&] { c->reduce_scatter(y.matrix(), x.matrix()); }), HasSubstr("in is (3, 4)"));
  EXPECT_THAT(refusal([&] { c->reduce_scatter(ids.matrix(), ids.matrix()); }), HasSubstr("in is int32"));
  EXPECT_THAT(refusal([&] { c->broadcast(x.matrix(), 2); }), HasSubstr("root is 2, expected 0 to 1"));
  const auto all_to_all = [&](const Matrix& in, auto to, const Matrix& out, auto from) {
    return refusal([&] { c->all_to_all_v(in, to, out, from); });
  };
  EXPECT_THAT(all_to_all(x.matrix(), one, x.matrix(), two), HasSubstr("to has 1 counts, expected 2"));
  EXPECT_THAT(all_to_all(x.matrix(), less, x.matrix(), two), HasSubstr("to has a count of -1"));
  EXPECT_THAT(all_to_all(x.matrix(), more, x.matrix(), two), HasSubstr("to adds up to 4, expected 2"));
  EXPECT_THAT(all_to_all(x.matrix(), two, ids.matrix(), two), HasSubstr("out is (2, 4) int32"));
  EXPECT_THAT(all_to_all(x.matrix(), uneven, x.matrix(), two), HasSubstr("from[0] is 1, expected to[0], 2"));
}

}  // namespace
}  // namespace flash_mla::comm
