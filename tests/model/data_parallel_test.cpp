// Ranks with tokens of their own that share the experts, against one rank that has all tokens.

#include <gmock/gmock.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checkpoint/config.h"
#include "flash_mla/error.h"
#include "model/model.h"
#include "model/parallel/lock_step.h"
#include "model/parallel/parallel_model.h"
#include "rank_session.h"
#include "sanitized.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using testing::HasSubstr;

ModelOptions options_of(int dp, bool batch_invariant = false, int tp = 1) {
  ModelOptions options;
  options.device = ModelDevice::kCpu;
  options.precision = ModelPrecision::kFloat32;
  options.num_threads = tp * dp;  // one each
  options.tp = tp;
  options.dp = dp;
  options.batch_invariant = batch_invariant;
  options.draft_module = true;
  return options;
}

/// Every rank has the sequences of its number modulo the ranks, which may be none.
Said run(const std::vector<std::unique_ptr<Model>>& ranks, bool batch_invariant) {
  std::vector<std::unique_ptr<Session>> sessions(ranks.size());
  const auto own = [&](std::size_t rank) {
    std::vector<std::size_t> out;
    for (std::size_t s = rank; s < 3; s += ranks.size()) out.push_back(s);
    return out;
  };
  {
    std::vector<std::jthread> threads;
    for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          sessions[rank] = std::make_unique<Session>(*ranks[rank], batch_invariant, own(rank));
        } catch (const std::exception& e) {
          ADD_FAILURE() << "rank " << rank << ": " << e.what();
        }
      });
    }
  }
  Said out;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    EXPECT_EQ(ranks[rank]->broken(), "");
    for (const std::size_t s : own(rank)) {
      if (!sessions[rank]) continue;
      out.logits[s] = sessions[rank]->said.logits[s];
      out.tokens[s] = sessions[rank]->said.tokens[s];
    }
  }
  return out;
}

// Under a sanitizer every step takes many times as long, and what there is to find is in the fewest ranks already.
constexpr auto kManyRanks = unless_sanitized(std::array{2, 3, 4}, std::array{2});
constexpr auto kGroups = unless_sanitized(std::array{std::pair(2, 2), std::pair(3, 2), std::pair(2, 4)},
                                          std::array{std::pair(2, 2)});
constexpr int kFailures = unless_sanitized(20, 4);

class DataParallel : public testing::TestWithParam<Kind> {
 protected:
  DataParallel() {
    const std::string text = config(GetParam());
    directory_.write("config.json", text);
    directory_.write("model.safetensors", RandomCheckpoint(checkpoint::parse_config(text, "test"),
                                                           GetParam().stored, /*with_module=*/true)
                                              .bytes());
  }
  Said session(const ModelOptions& options) const {
    return run(load_models(directory_.path(), options), options.batch_invariant);
  }

  TemporaryDirectory directory_;
};
INSTANTIATE_TEST_SUITE_P(Models, DataParallel, testing::ValuesIn(kKinds),
                         [](const auto& kind) { return std::string(kind.param.name); });

void expect_close(const Said& a, const Said& b) {
  EXPECT_LT(largest_difference(a, b), 1e-4);
  EXPECT_EQ(a.tokens, b.tokens);
}

TEST_P(DataParallel, SaysWhatOneRankSays) {
  const Said one = session(options_of(1));
  for (const int dp : {2, 4}) {  // of 4 ranks one never has a token
    SCOPED_TRACE(dp);
    expect_close(one, session(options_of(dp)));
  }
}

// And so wherever a sequence runs, and whatever runs elsewhere.
TEST_P(DataParallel, HasTheBitsOfOneRankInBatchInvariantMode) {
  const Said one = session(options_of(1, true));
  for (const int dp : kManyRanks) {
    SCOPED_TRACE(dp);
    EXPECT_EQ(one, session(options_of(dp, true)));
  }
}

// Groups of ranks that share the attention of their tokens, and the experts with all others.
TEST_P(DataParallel, OfGroupsSaysWhatOneRankSays) {
  const Said one = session(options_of(1)), exact = session(options_of(1, true));
  for (const auto& [tp, dp] : kGroups) {
    SCOPED_TRACE(testing::Message() << tp << " x " << dp);
    expect_close(one, session(options_of(dp, false, tp)));
    EXPECT_EQ(exact, session(options_of(dp, true, tp)));
  }
  directory_.write("placement.json", uneven_placement());
  for (const std::string how : {"round-robin", "ep 2", "file"}) {
    SCOPED_TRACE(how);
    ModelOptions options = options_of(2, true, 2);
    if (how == "ep 2") {
      options.ep = 2;
    } else {
      options.expert_placement = how == "file" ? (directory_.path() / "placement.json").string() : how;
    }
    EXPECT_EQ(exact, session(options));
  }
}

TEST_P(DataParallel, OfGroupsCountsForEveryRank) {
  const auto one = load_models(directory_.path(), options_of(1)),
             groups = load_models(directory_.path(), options_of(2, false, 2));
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0]->bytes_per_page(), 2 * one[0]->bytes_per_page()) << "both ranks have the cache";
  run(groups, false);
  for (const auto& group : groups) {
    const std::vector<RankStats> stats = group->rank_stats();
    ASSERT_EQ(stats.size(), 2u);
    for (const RankStats& rank : stats) {
      EXPECT_GT(rank.bytes_sent, 0);
      EXPECT_GT(rank.weight_bytes, 0);
      EXPECT_LT(rank.weight_bytes, one[0]->weight_bytes());
      EXPECT_GE(rank.seconds, rank.exchange_seconds);
    }
    const std::vector<RankSpan> spans = group->rank_spans();
    ASSERT_EQ(spans.size(), 2u);
    for (const RankSpan& span : spans) {
      const double seconds = std::chrono::duration<double>(span.end - span.begin).count();
      EXPECT_GT(span.exchange_seconds, 0);
      EXPECT_GE(seconds, span.exchange_seconds);
    }
  }
}

TEST_P(DataParallel, PlacesExpertsAsItIsTold) {
  const Said one = session(options_of(1)), exact = session(options_of(1, true));
  directory_.write("placement.json", uneven_placement());
  for (const std::string how : {"round-robin", "ep 2", "ep 1", "file"}) {
    SCOPED_TRACE(how);
    ModelOptions options = options_of(4);
    if (how.starts_with("ep")) {
      options.ep = how.back() - '0';
    } else {
      options.expert_placement = how == "file" ? (directory_.path() / "placement.json").string() : how;
    }
    expect_close(one, session(options));
    options.batch_invariant = true;
    EXPECT_EQ(exact, session(options));
  }
}

TEST_P(DataParallel, OfBfloat16HasThoseBitsToo) {
  ModelOptions one = options_of(1, true), two = options_of(2, true);
  one.precision = two.precision = ModelPrecision::kBFloat16;
  try {
    EXPECT_EQ(session(one), session(two));
  } catch (const Unsupported& e) {
    GTEST_SKIP() << e.what();  // no AVX-512
  }
}

TEST_P(DataParallel, OfRandomWeightsHasThoseOfOneRank) {
  const ModelConfig parsed = checkpoint::parse_config(config(GetParam()), "test");
  EXPECT_EQ(run(make_random_models(parsed, options_of(1, true)), true),
            run(make_random_models(parsed, options_of(3, true)), true));
}

TEST_P(DataParallel, HasACacheOnEveryRankAndCountsWhatRanksExchange) {
  const auto one = load_models(directory_.path(), options_of(1)),
             two = load_models(directory_.path(), options_of(2));
  EXPECT_EQ(one[0]->bytes_per_page(), two[0]->bytes_per_page());
  run(two, false);
  for (const auto& rank : two) {
    const std::vector<RankStats> stats = rank->rank_stats();
    ASSERT_EQ(stats.size(), 1u);
    EXPECT_GT(stats[0].exchanges, 0);
    EXPECT_GT(stats[0].bytes_sent, 0);
    EXPECT_GE(stats[0].seconds, stats[0].exchange_seconds);
  }
  EXPECT_EQ(two[0]->rank_stats()[0].exchanges, two[1]->rank_stats()[0].exchanges);
}

TEST_P(DataParallel, CountsTheChoicesThatOneRankCounts) {
  const auto one = load_models(directory_.path(), options_of(1, true)),
             three = load_models(directory_.path(), options_of(3, true));
  run(one, true);
  run(three, true);
  const std::vector<ExpertCounts> expected = one[0]->expert_counts();
  ASSERT_FALSE(expected.empty());
  for (std::size_t layer = 0; layer < expected.size(); ++layer) {
    std::vector<std::int64_t> chosen(expected[layer].counts.size());
    std::int64_t have_run = 0;
    for (const auto& rank : three) {
      const ExpertCounts of = rank->expert_counts().at(layer);
      for (std::size_t e = 0; e < chosen.size(); ++e) chosen[e] += of.counts.at(e);
      have_run += of.rank_counts.at(0);
    }
    EXPECT_EQ(chosen, expected[layer].counts);
    EXPECT_EQ(have_run, std::accumulate(chosen.begin(), chosen.end(), std::int64_t{0}))
        << "every choice on one rank";
  }
}

// Ranks that do nothing but meet, ten times a step.
class Meeting : public Model {
 public:
  /// Throws at the `fails_at`-th meeting; -1: never. `sleeps`: does not come to it.
  Meeting(comm::Communicator& communicator, int fails_at, std::chrono::milliseconds sleeps)
      : communicator_(communicator), fails_at_(fails_at), sleeps_(sleeps) {}
  int vocab_size() const override { return 1; }
  std::int64_t max_position() const override { return 1; }
  std::size_t bytes_per_page() const override { return 10; }
  ScheduleOptions schedule_options(int /*sequences*/, bool /*batch_invariant*/) const override { return {}; }
  void allocate_cache(int /*num_pages*/) override {}
  void copy_page(int /*source*/, int /*target*/) override {}
  void reserve(int /*num_tokens*/, int /*num_rows*/) override {}
  void launch(const ForwardBatch& /*batch*/) override {
    float x = 1;
    for (int i = 0; i < 10; ++i) {
      if (meetings_++ == fails_at_) {
        if (sleeps_.count() == 0) throw std::runtime_error("the memory of the device is broken");
        std::this_thread::sleep_for(sleeps_);
      }
      communicator_.all_reduce({reinterpret_cast<std::byte*>(&x), DType::kFloat32, 1, 1, 1});
    }
    ++steps;
  }
  void collect(float* /*logits*/, std::int32_t* /*tokens*/) override {}
  int steps = 0;

 private:
  comm::Communicator& communicator_;
  int fails_at_, meetings_ = 0;
  std::chrono::milliseconds sleeps_;
};

/// Five steps on each of three ranks, rank r launching those that it has tokens in (here: at random). What each hears.
std::vector<std::string> meet(int failing, int fails_at, std::chrono::milliseconds sleeps,
                              std::chrono::milliseconds timeout, int seed) {
  std::vector<std::string> out(3);
  const auto ranks = LockStepModel::make(
      3, false,
      [&](int rank, comm::Communicator& communicator) {
        return std::make_unique<Meeting>(communicator, rank == failing ? fails_at : -1, sleeps);
      },
      timeout);
  {
    std::vector<std::jthread> threads;
    for (std::size_t r = 0; r < 3; ++r) {
      threads.emplace_back([&, r] {
        std::mt19937 random(static_cast<unsigned>(seed) + static_cast<unsigned>(r));
        for (int step = 0; step < 5; ++step) {
          if (random() % 2 == 0) {
            try {
              ranks[r]->launch({});
            } catch (const comm::RankError&) {
            }
          }
          ranks[r]->end_step();
        }
        out[r] = ranks[r]->broken();
      });
    }
  }
  for (std::size_t r = 0; r < 3 && !out[r].empty(); ++r) {
    EXPECT_EQ(message_of<comm::RankError>([&] { ranks[r]->launch({}); }), out[r]) << "from then on";
    EXPECT_EQ(message_of<comm::RankError>([&] { ranks[r]->draft({}, nullptr); }), out[r]);
  }
  return out;
}

TEST(DataParallelFailure, EndsAllRanksWithNameAndReason) {
  std::mt19937 random(3);
  for (int i = 0; i < kFailures; ++i) {
    const int failing = static_cast<int>(random() % 3), fails_at = static_cast<int>(random() % 50);
    const auto begin = std::chrono::steady_clock::now();
    const std::string expected = "rank " + std::to_string(failing) + ": the memory of the device is broken";
    EXPECT_THAT(meet(failing, fails_at, {}, comm::kTimeout, i), testing::Each(expected));
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
  }
  EXPECT_THAT(meet(-1, -1, {}, comm::kTimeout, 5), testing::Each(""));
}

// Two groups of two ranks that meet in their group, and all four.
class MeetingTwice : public Meeting {
 public:
  MeetingTwice(const RankLinks& links, int fails_at)
      : Meeting(*links.ranks, fails_at, {}), all_(*links.expert_ranks) {}
  void launch(const ForwardBatch& batch) override {
    for (int i = 0; i < 3; ++i) {
      Meeting::launch(batch);
      float x = 1;
      all_.all_reduce({reinterpret_cast<std::byte*>(&x), DType::kFloat32, 1, 1, 1});
    }
  }

 private:
  comm::Communicator& all_;
};

TEST(DataParallelFailure, OfARankOfAGroupEndsAllGroups) {
  std::mt19937 random(4);
  for (int i = 0; i < kFailures; ++i) {
    const int failing = static_cast<int>(random() % 4), fails_at = static_cast<int>(random() % 90);
    const auto all = std::make_shared<comm::ThreadGroup>(4);
    const auto groups = LockStepModel::make({0, 2}, false, [&](int group, comm::Communicator&) {
      return std::make_unique<ParallelModel>(2, all, 2 * group, [&](int rank, const RankLinks& links) {
        return std::make_unique<MeetingTwice>(links, 2 * group + rank == failing ? fails_at : -1);
      });
    });
    std::vector<std::string> heard(2);
    {
      std::vector<std::jthread> threads;
      for (std::size_t group = 0; group < 2; ++group) {
        threads.emplace_back([&, group] {
          for (int step = 0; step < 4; ++step) groups[group]->end_step();
          heard[group] = groups[group]->broken();
        });
      }
    }
    EXPECT_THAT(heard,
                testing::Each("rank " + std::to_string(failing) + ": the memory of the device is broken"));
  }
}

TEST(DataParallelFailure, IsATimeOutWhereARankDoesNotCome) {
  // Long enough for the others on a busy machine.
  const auto heard = meet(1, 13, std::chrono::milliseconds(3500), std::chrono::milliseconds(3000), 1);
  EXPECT_THAT(
      heard,
      testing::Each(HasSubstr("rank 1: has not come to all_reduce of 1 float32 x 1 rows within 3000 ms")));
}

TEST(DataParallelFailure, InLoadingIsTheRanksOwn) {
  EXPECT_EQ(message_of<InvalidArgument>([] {
              LockStepModel::make(2, false, [](int rank, comm::Communicator& communicator) {
                if (rank == 1) throw InvalidArgument("a tensor is missing");
                return std::make_unique<Meeting>(communicator, -1, std::chrono::milliseconds(0));
              });
            }),
            "a tensor is missing");
}

std::string refusal(const ModelOptions& options) {
  const ModelConfig parsed = checkpoint::parse_config(config(kKinds[1]), "test");
  return message_of<InvalidArgument>([&] { make_random_models(parsed, options); });
}

TEST(DataParallelOptions, ThatCannotBeAreRefused) {
  EXPECT_EQ(refusal(options_of(0)), "dp is 0, expected >= 1");
  ModelOptions options = options_of(2);
  options.tp = 5;
  EXPECT_EQ(refusal(options), "tp is 5, expected a divisor of 12, the attention heads");
  options.tp = 2;
  options.ep = 3;
  EXPECT_EQ(refusal(options), "ep is 3, expected 0 or a divisor of 4, tp times dp");
  EXPECT_EQ(refusal(options_of(12)), "ep is 12, expected at most 10, the routed experts");
  const ModelConfig parsed = checkpoint::parse_config(config(kKinds[1]), "test");
  EXPECT_EQ(message_of<InvalidArgument>([&] { make_random_model(parsed, options_of(2)); }),
            "dp is 2, expected 1: one model is asked for");
  options = options_of(2);
  options.device = ModelDevice::kCuda;
  EXPECT_EQ(message_of<Unsupported>([&] { make_random_models(parsed, options); }),
            "dp is 2: on device cuda all ranks have the same tokens so far; use tp or device cpu");
  // More ranks than heads go, since heads are not cut.
  options = options_of(7);
  EXPECT_EQ(make_random_models(parsed, options).size(), 7u);
}

}  // namespace
}  // namespace flash_mla::model
