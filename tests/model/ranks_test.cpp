// A model on several ranks against the same on one: random checkpoints of every architecture, in which nothing divides
// evenly but the heads.

#include <gmock/gmock.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint/config.h"
#include "flash_mla/error.h"
#include "model/model.h"
#include "model/parallel/expert_placement.h"
#include "model/parallel/parallel_model.h"
#include "model/parallel/partition.h"
#include "rank_session.h"
#include "sanitized.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using testing::HasSubstr;

ModelOptions on_ranks(int tp, bool batch_invariant = false) {
  ModelOptions options;
  options.device = ModelDevice::kCpu;
  options.precision = ModelPrecision::kFloat32;
  options.num_threads = tp;  // one each
  options.tp = tp;
  options.batch_invariant = batch_invariant;
  return options;
}

// Under a sanitizer every step takes many times as long, and what there is to find is in the fewest ranks already.
constexpr auto kRanks = unless_sanitized(std::array{2, 4}, std::array{2});
constexpr auto kExactRanks = unless_sanitized(std::array{2, 3}, std::array{3});  // exactly 4 are below
constexpr int kFailures = unless_sanitized(20, 4);

class Ranks : public testing::TestWithParam<Kind> {
 protected:
  Ranks() {
    const std::string text = config(GetParam());
    const ModelConfig parsed = checkpoint::parse_config(text, "test");
    directory_.write("config.json", text);
    directory_.write("model.safetensors",
                     RandomCheckpoint(parsed, GetParam().stored, /*with_module=*/true).bytes());
  }
  std::unique_ptr<Model> load(ModelOptions options) const {
    options.draft_module = true;
    return load_model(directory_.path(), options);
  }
  Said session(const ModelOptions& options, bool batch_invariant = false) const {
    return Session(*load(options), batch_invariant).said;
  }

  TemporaryDirectory directory_;
};
INSTANTIATE_TEST_SUITE_P(Models, Ranks, testing::ValuesIn(kKinds),
                         [](const auto& kind) { return std::string(kind.param.name); });

void expect_close(const Said& a, const Said& b) {
  EXPECT_LT(largest_difference(a, b), 1e-4);
  EXPECT_EQ(a.tokens, b.tokens);
}

TEST_P(Ranks, SayWhatOneRankSays) {
  const Said one = session(on_ranks(1));
  for (const int tp : kRanks) {
    SCOPED_TRACE(tp);
    expect_close(one, session(on_ranks(tp)));
  }
}

TEST_P(Ranks, HaveItsBitsInBatchInvariantMode) {
  const Said one = session(on_ranks(1, true), true);
  for (const int tp : kExactRanks) {
    SCOPED_TRACE(tp);
    const Said many = session(on_ranks(tp, true), true);
    EXPECT_EQ(one, many);
  }
}

// Wherever the experts are, and on however many ranks each.
TEST_P(Ranks, PlaceExpertsAsTheyAreTold) {
  const Said one = session(on_ranks(1)), exact = session(on_ranks(1, true), true);
  directory_.write("placement.json", uneven_placement());
  for (const std::string how : {"round-robin", "ep 2", "ep 1", "file"}) {
    SCOPED_TRACE(how);
    ModelOptions options = on_ranks(4);
    if (how.starts_with("ep")) {
      options.ep = how.back() - '0';
    } else {
      options.expert_placement = how == "file" ? (directory_.path() / "placement.json").string() : how;
    }
    expect_close(one, session(options));
    options.batch_invariant = true;
    const Said bits = session(options, true);
    EXPECT_EQ(exact, bits);
  }
}

TEST_P(Ranks, OfBfloat16HaveThoseBitsToo) {
  ModelOptions one = on_ranks(1, true), two = on_ranks(2, true);
  one.precision = two.precision = ModelPrecision::kBFloat16;
  std::unique_ptr<Model> whole;
  try {
    whole = load(one);
  } catch (const Unsupported& e) {
    GTEST_SKIP() << e.what();  // no AVX-512
  }
  const Said expected = Session(*whole, true).said, got = session(two, true);
  EXPECT_EQ(expected, got);
}

TEST_P(Ranks, OfRandomWeightsHaveThoseOfOneRank) {
  const ModelConfig parsed = checkpoint::parse_config(config(GetParam()), "test");
  const auto whole = make_random_model(parsed, on_ranks(1, true));
  const auto parts = make_random_model(parsed, on_ranks(4, true));
  EXPECT_EQ(Session(*whole, true).said, Session(*parts, true).said);
}

// Failures, on ranks that do nothing else than meet.
class Meeting : public Model {
 public:
  /// Throws at the `fails_at`-th exchange; -1: never. `sleeps`: does not come to it.
  Meeting(comm::Communicator& communicator, int fails_at, std::chrono::milliseconds sleeps)
      : communicator_(communicator), fails_at_(fails_at), sleeps_(sleeps) {}
  int vocab_size() const override { return 1; }
  std::int64_t max_position() const override { return 1; }
  std::size_t bytes_per_page() const override { return 10; }
  ScheduleOptions schedule_options(int /*sequences*/, bool /*batch_invariant*/) const override { return {}; }
  void allocate_cache(int num_pages) override {
    if (num_pages > 5 && communicator_.rank() == 1) throw std::bad_alloc();
  }
  void copy_page(int /*source*/, int /*target*/) override {}
  void reserve(int /*num_tokens*/, int /*num_rows*/) override {}
  void launch(const ForwardBatch& batch) override {
    if (batch.max_blocks < 0) throw InvalidArgument("max_blocks is -1");
    float x = 1;
    for (int i = 0; i < 10; ++i) {
      if (exchanges_++ == fails_at_) {
        if (sleeps_.count() == 0) throw std::runtime_error("the memory of the device is broken");
        std::this_thread::sleep_for(sleeps_);
      }
      communicator_.all_reduce({reinterpret_cast<std::byte*>(&x), DType::kFloat32, 1, 1, 1});
    }
  }
  void collect(float* /*logits*/, std::int32_t* /*tokens*/) override {}

 private:
  comm::Communicator& communicator_;
  int fails_at_, exchanges_ = 0;
  std::chrono::milliseconds sleeps_;
};

std::unique_ptr<ParallelModel> meet(int failing, int fails_at, std::chrono::milliseconds sleeps = {},
                                    std::chrono::milliseconds timeout = comm::kTimeout) {
  return std::make_unique<ParallelModel>(
      4,
      [=](int rank, comm::Communicator& communicator) {
        return std::make_unique<Meeting>(communicator, rank == failing ? fails_at : -1, sleeps);
      },
      timeout);
}

// At a random moment, twenty times: no step hangs, and every later one says the same.
TEST(RankFailure, EndsTheModelWithNameAndReason) {
  std::mt19937 random(1);
  for (int i = 0; i < kFailures; ++i) {
    const int failing = static_cast<int>(random() % 4), fails_at = static_cast<int>(random() % 50);
    const auto model = meet(failing, fails_at);
    const auto begin = std::chrono::steady_clock::now();
    std::string message;
    int steps = 0;
    for (; steps < 10 && message.empty(); ++steps) {
      try {
        model->launch({});
      } catch (const comm::RankError& e) {
        message = e.what();
        EXPECT_EQ(e.rank(), failing);
      }
    }
    EXPECT_EQ(message, "rank " + std::to_string(failing) + ": the memory of the device is broken");
    EXPECT_EQ(steps, fails_at / 10 + 1);
    EXPECT_EQ(message_of<comm::RankError>([&] { model->launch({}); }), message);
    EXPECT_EQ(message_of<comm::RankError>([&] { model->copy_page(0, 1); }), message);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
  }
}

TEST(RankFailure, IsATimeOutWhereARankDoesNotCome) {
  // Long enough for the others on a busy machine.
  const auto model = meet(2, 13, std::chrono::milliseconds(3500), std::chrono::milliseconds(3000));
  model->launch({});
  EXPECT_THAT(message_of<comm::RankError>([&] { model->launch({}); }),
              HasSubstr("rank 2: has not come to all_reduce of 1 float32 x 1 rows within 3000 ms"));
}

TEST(RankFailure, IsNotWhatAllRefuseAlike) {
  const auto model = meet(0, -1);
  ForwardBatch wrong;
  wrong.max_blocks = -1;
  EXPECT_EQ(message_of<InvalidArgument>([&] { model->launch(wrong); }), "max_blocks is -1");
  EXPECT_THROW(model->allocate_cache(6), std::bad_alloc);  // of one rank
  model->allocate_cache(5);
  model->launch({});
  EXPECT_EQ(model->bytes_per_page(), 40u);
  const std::vector<RankStats> traffic = model->rank_stats();
  ASSERT_EQ(traffic.size(), 4u);
  for (const RankStats& rank : traffic) {
    EXPECT_EQ(rank.exchanges, 10);
    EXPECT_EQ(rank.bytes_sent, 60);
    EXPECT_GE(rank.seconds, rank.exchange_seconds);
  }
}

TEST(RankFailure, InLoadingIsTheRanksOwn) {
  EXPECT_EQ(message_of<InvalidArgument>([] {
              ParallelModel model(
                  3, [](int rank, comm::Communicator& communicator) -> std::unique_ptr<Model> {
                    if (rank == 2) throw InvalidArgument("a tensor is missing");
                    return std::make_unique<Meeting>(communicator, -1, std::chrono::milliseconds(0));
                  });
            }),
            "a tensor is missing");
}

std::string refusal(const ModelOptions& options) {
  const ModelConfig parsed = checkpoint::parse_config(config(kKinds[1]), "test");
  return message_of<InvalidArgument>([&] { make_random_model(parsed, options); });
}

TEST(RankOptions, ThatCannotBeAreRefused) {
  EXPECT_EQ(refusal(on_ranks(5)), "tp is 5, expected a divisor of 12, the attention heads");
  EXPECT_EQ(refusal(on_ranks(0)), "tp is 0, expected a divisor of 12, the attention heads");
  ModelOptions options = on_ranks(4);
  options.ep = 3;
  EXPECT_EQ(refusal(options), "ep is 3, expected 0 or a divisor of 4, tp times dp");
  options = on_ranks(12);
  EXPECT_EQ(refusal(options), "ep is 12, expected at most 10, the routed experts");
  options = on_ranks(2);
  options.expert_placement = "/nowhere.json";
  EXPECT_THAT(refusal(options), HasSubstr("/nowhere.json"));
}

TEST(Placement, OfAFileIsChecked) {
  const ModelConfig parsed = checkpoint::parse_config(
      R"({"model_type": "deepseek_v2", "q_lora_rank": null, "hidden_size": 8, "intermediate_size": 8,
          "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
          "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2, "vocab_size": 8,
          "num_experts_per_tok": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1, "norm_topk_prob": false,
          "max_position_embeddings": 64, "rope_theta": 1})",
      "test");
  TemporaryDirectory directory;
  const auto place = [&](const std::string& text) {
    directory.write("p.json", text);
    return ExpertPlacement(parsed, 2, 2, (directory.path() / "p.json").string());
  };
  const auto refused = [&](const std::string& text) {
    return message_of<InvalidArgument>([&] { place(text); });
  };
  const ExpertPlacement good = place(R"({"layers": {"1": [[1, 0], [1]]}})");
  EXPECT_THAT(good.layer(1), testing::ElementsAre(testing::ElementsAre(0, 1), testing::ElementsAre(1)));
  EXPECT_EQ(good.layer(2), good.layer(1)) << "the module's";
  EXPECT_THAT(refused(R"({"layers": {"0": []}})"), HasSubstr("layers has no \"1\", a mixture layer"));
  EXPECT_THAT(refused(R"({"layers": {"1": [[0]]}})"), HasSubstr("expected 2 lists of ranks"));
  EXPECT_THAT(refused(R"({"layers": {"1": [[0], []]}})"),
              HasSubstr("layers.1[1] = []: expected a list of at least"));
  EXPECT_THAT(refused(R"({"layers": {"1": [[0], [2]]}})"),
              HasSubstr("layers.1[1] = 2: expected ranks from 0 to 1"));
  EXPECT_THAT(refused(R"({"layers": {"1": [[0, 0], [1]]}})"), HasSubstr("every rank once"));
  EXPECT_THAT(refused("{}"), HasSubstr("layers"));
}

TEST(Partition, SharesCutBlocksWhereThereAreEnough) {
  Partition p;
  p.size = 3;
  EXPECT_EQ(p.share(512, 0).count, 128);
  EXPECT_EQ(p.share(512, 1).first, 128);
  EXPECT_EQ(p.share(512, 2).count, 256);
  EXPECT_EQ(p.largest_share(512), 256);
  EXPECT_EQ(p.share(256, 1).count, 85) << "fewer blocks than ranks";
  EXPECT_EQ(p.share(100, 2).end(), 100);
}

}  // namespace
}  // namespace flash_mla::model
