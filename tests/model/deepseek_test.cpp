// The model over a device that only writes down what it is asked.

#include "model/deepseek.h"

#include <gmock/gmock.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned.h"
#include "checkpoint/config.h"
#include "flash_mla/error.h"

namespace flash_mla::model {
namespace {

using testing::ElementsAre;

using Calls = std::vector<std::string>;

struct RecordedEmbedding : Embedding {
  explicit RecordedEmbedding(Calls& calls) : calls_(calls) {}
  Residual forward() override {
    calls_.push_back("embedding");
    return {};
  }

 private:
  Calls& calls_;
};

struct RecordedAttention : Attention {
  RecordedAttention(Calls& calls, std::string name) : calls_(calls), name_(std::move(name)) {}
  void forward(Residual&, Rows rows) override {
    calls_.push_back(name_ + (rows == Rows::kLogits ? " of logit rows" : ""));
  }
  std::size_t bytes_per_page() const override { return 100; }
  void free_cache() override { calls_.push_back(name_ + " free"); }
  void allocate_cache(int num_pages) override {
    calls_.push_back(name_ + " allocate " + std::to_string(num_pages));
  }
  void copy_page(int source, int target) override {
    calls_.push_back(name_ + " copy " + std::to_string(source) + " " + std::to_string(target));
  }
  std::array<std::span<std::byte>, 2> page(int index) const override {
    std::byte* const first = bytes_.data() + std::ptrdiff_t{100} * index;
    return {std::span(first, 60), std::span(first + 60, 40)};
  }
  std::string page_format() const override { return "bytes of " + name_; }
  const std::string& name() const { return name_; }

 private:
  // Of every byte of the cache its page.
  mutable std::vector<std::byte> bytes_ = [] {
    std::vector<std::byte> out(1000);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::byte>(i / 100);
    return out;
  }();
  Calls& calls_;
  std::string name_;
};

struct RecordedFeedForward : FeedForward {
  RecordedFeedForward(Calls& calls, std::string name) : calls_(calls), name_(std::move(name)) {}
  void forward(Residual&) override { calls_.push_back(name_ + before_); }
  void set_next(const Attention& next) override {
    before_ = " before " + static_cast<const RecordedAttention&>(next).name();
  }
  std::vector<std::int32_t> experts_taken(int num_tokens) const override {
    if (name_ != "experts 1") return {};
    return std::vector<std::int32_t>(static_cast<std::size_t>(num_tokens), 3);
  }

 private:
  Calls& calls_;
  std::string name_, before_;
};

struct RecordedHead : Head {
  explicit RecordedHead(Calls& calls) : calls_(calls) {}
  Matrix forward(const Residual&) override {
    calls_.push_back("head");
    return {};
  }

 private:
  Calls& calls_;
};

struct RecordedMtpInput : MtpInput {
  explicit RecordedMtpInput(Calls& calls) : calls_(calls) {}
  void keep(const Residual&) override { calls_.push_back("keep states"); }
  void keep_own(const Residual&) override { calls_.push_back("keep own states"); }
  void forward(Residual&) override { calls_.push_back("input of the module"); }

 private:
  Calls& calls_;
};

class RecordingDevice : public Device {
 public:
  explicit RecordingDevice(Calls& calls) : calls_(calls) {}

  std::size_t free_memory() const override { return 0; }
  ScheduleOptions schedule_options(int, bool) const override { return {}; }
  bool queues() const override { return true; }
  double device_seconds() const override { return 0; }
  DType weight_dtype() const override { return DType::kFloat32; }
  bool makes_up_weights() const override { return true; }
  std::unique_ptr<Embedding> make_embedding(const Weight&) override {
    return std::make_unique<RecordedEmbedding>(calls_);
  }
  std::unique_ptr<Attention> make_attention(const AttentionWeights&) override {
    return std::make_unique<RecordedAttention>(calls_, "attention " + std::to_string(attentions_++));
  }
  std::unique_ptr<FeedForward> make_feed_forward(const FeedForwardWeights&) override {
    return std::make_unique<RecordedFeedForward>(calls_, "dense " + std::to_string(networks_++));
  }
  std::unique_ptr<FeedForward> make_mixture_of_experts(const MixtureWeights&) override {
    return std::make_unique<RecordedFeedForward>(calls_, "experts " + std::to_string(networks_++));
  }
  std::unique_ptr<Head> make_head(const HeadWeights&) override {
    return std::make_unique<RecordedHead>(calls_);
  }
  std::unique_ptr<MtpInput> make_mtp_input(const MtpWeights&) override {
    return std::make_unique<RecordedMtpInput>(calls_);
  }
  std::unique_ptr<Head> make_mtp_head(const Head&, const MtpWeights&) override {
    return std::make_unique<RecordedHead>(calls_);
  }
  void reserve(std::int64_t, std::int64_t) override {}
  void begin_step(Step& step) override {
    calls_.push_back("begin step of " + std::to_string(step.num_tokens()));
  }
  void run(const std::function<void()>& pass) override { pass(); }
  bool chooses_among() const override { return true; }
  void choose_among(std::int64_t first, std::span<const TokenRule> rules) override {
    calls_.push_back("choose among, rows " + std::to_string(first) + " to " +
                     std::to_string(first + std::ssize(rules)));
  }
  void choose(const Matrix&) override { calls_.push_back("choose"); }
  void download_logits(std::int64_t rows, float*) override {
    calls_.push_back("download " + std::to_string(rows) + " rows of logits");
  }
  std::unique_ptr<Download> start_token_download(std::int64_t first, std::int64_t count) override {
    struct Tokens : Download {
      std::vector<std::int32_t> values;
      const std::byte* wait() override { return reinterpret_cast<const std::byte*>(values.data()); }
    };
    calls_.push_back("download tokens " + std::to_string(first) + " to " + std::to_string(first + count));
    auto out = std::make_unique<Tokens>();
    out->values.assign(static_cast<std::size_t>(count), 7);
    return out;
  }
  std::unique_ptr<CopyQueue> make_copy_queue() override {
    struct Queue : CopyQueue {
      explicit Queue(Calls& c) : calls(c) {}
      void wait_for_steps() override { calls.push_back("copies wait for steps"); }
      void copy(std::byte* to, const std::byte* from, std::size_t bytes) override {
        std::memcpy(to, from, bytes);
      }
      std::unique_ptr<CopyMark> mark() override { return nullptr; }
      Calls& calls;
    };
    return std::make_unique<Queue>(calls_);
  }
  Buffer allocate_host(std::size_t bytes) override { return allocate_aligned(bytes); }

 private:
  Calls& calls_;
  int attentions_ = 0, networks_ = 0;
};

class DeepSeekTest : public testing::Test {
 protected:
  DeepSeekTest() {
    const auto weights = random_weights(config_, /*made_up_by_device=*/true);
    model_ = std::make_unique<DeepSeek>(config_, std::make_unique<RecordingDevice>(calls_), *weights);
  }

  const ModelConfig config_ = checkpoint::parse_config(R"({
    "model_type": "deepseek_v2", "vocab_size": 30, "hidden_size": 24, "intermediate_size": 20,
    "moe_intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "q_lora_rank": null,
    "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": false,
    "max_position_embeddings": 256, "rope_theta": 10000.0})",
                                                       "test");
  Calls calls_;
  std::unique_ptr<DeepSeek> model_;
};

TEST_F(DeepSeekTest, WalksTheLayersInOrderAndNarrowsInTheLast) {
  model_->allocate_cache(2);
  calls_.clear();
  const std::int32_t ids[] = {1, 2, 3}, starts[] = {0, 3}, lengths[] = {3}, pages[] = {1}, rows[] = {2, 1},
                     greedy[] = {2};
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = pages;
  batch.max_blocks = 1;
  batch.logit_rows = rows;
  batch.greedy_rows = greedy;
  std::vector<float> logits(60);
  std::int32_t token = 0;
  model_->forward(batch, logits.data(), &token);
  EXPECT_EQ(token, 7);
  EXPECT_THAT(calls_, ElementsAre("begin step of 3", "embedding", "attention 0", "dense 0 before attention 1",
                                  "attention 1", "experts 1 before attention 2", "attention 2 of logit rows",
                                  "experts 2", "head", "choose", "download tokens 2 to 3",
                                  "download 2 rows of logits"));
}

TEST_F(DeepSeekTest, CopiesPagesOfEveryLayerToTheHostAndBack) {
  model_->allocate_cache(8);
  calls_.clear();
  EXPECT_EQ(model_->page_format(), "bytes of attention 0; bytes of attention 1; bytes of attention 2; ");
  const std::unique_ptr<PageCopies> copies = model_->make_page_copies();
  copies->follow_steps();
  EXPECT_THAT(calls_, ElementsAre("copies wait for steps"));
  const std::int32_t pages[] = {5, 2};
  std::vector<std::byte> host(600);  // layers, pages, bytes
  copies->download(pages, host.data());
  for (std::size_t i = 0; i < host.size(); ++i) {
    ASSERT_EQ(static_cast<int>(host[i]), pages[i / 100 % 2]) << i;
  }
  // What is left out stays as it is.
  const std::int32_t targets[] = {-1, 3};
  copies->upload(targets, host.data());
  const std::int32_t all[] = {5, 2, 3};
  std::vector<std::byte> back(900);
  copies->download(all, back.data());
  const int expected[] = {5, 2, 2};
  for (std::size_t i = 0; i < back.size(); ++i) {
    ASSERT_EQ(static_cast<int>(back[i]), expected[i / 100 % 3]) << i;
  }
  const std::int32_t beyond[] = {8};
  EXPECT_THROW(copies->download(beyond, back.data()), InvalidArgument);
}

TEST_F(DeepSeekTest, KeepsACacheInEveryLayer) {
  EXPECT_EQ(model_->bytes_per_page(), 300u);
  model_->allocate_cache(5);
  EXPECT_THAT(calls_,
              ElementsAre("attention 0 free", "attention 1 free", "attention 2 free",
                          "attention 0 allocate 5", "attention 1 allocate 5", "attention 2 allocate 5"));
  calls_.clear();
  model_->copy_page(1, 4);
  EXPECT_THAT(calls_, ElementsAre("attention 0 copy 1 4", "attention 1 copy 1 4", "attention 2 copy 1 4"));
}

// Each application is queued before the tokens of any are waited for; it reads those of the one before from the device.
TEST_F(DeepSeekTest, QueuesTheApplicationsOfTheModule) {
  const auto weights = random_weights(config_, /*made_up_by_device=*/true, /*with_module=*/true);
  DeepSeek model(config_, std::make_unique<RecordingDevice>(calls_), *weights, /*draft_module=*/true);
  model.allocate_cache(2);
  calls_.clear();
  const std::int32_t ids[] = {1, 2, 3, 4}, starts[] = {0, 3, 4}, lengths[] = {3, 1}, pages[] = {1, 0},
                     greedy[] = {2, 3}, next[] = {2, 3, 7, 7}, states[] = {0, 1, 2, 3}, num_drafts[] = {1, 3};
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = pages;
  batch.max_blocks = 1;
  batch.greedy_rows = greedy;
  std::int32_t tokens[2];
  model.forward(batch, nullptr, tokens);
  EXPECT_THAT(calls_, ElementsAre("begin step of 4", "embedding", "attention 0", "dense 0 before attention 1",
                                  "attention 1", "experts 1 before attention 2", "attention 2", "experts 2",
                                  "keep states", "head", "choose", "download tokens 0 to 2"));
  calls_.clear();
  DraftBatch draft;
  draft.tokens = batch;
  draft.tokens.token_ids = next;
  draft.states = states;
  draft.num_drafts = num_drafts;
  const std::vector<Draw> draws(4);
  draft.draws = draws;
  std::int32_t drafts[4];
  model.draft(draft, drafts);
  EXPECT_THAT(drafts, testing::Each(7));
  Calls expected;
  for (const auto& [count, sequences] : {std::pair(4, 2), std::pair(1, 1), std::pair(1, 1)}) {
    for (const std::string& call :
         {"begin step of " + std::to_string(count), std::string("embedding"),
          std::string("input of the module"), std::string("attention 3 of logit rows"),
          std::string("experts 3"), std::string("keep own states"), std::string("head"),
          std::string("choose"), "download tokens 0 to " + std::to_string(sequences)}) {
      expected.push_back(call);
    }
  }
  EXPECT_EQ(calls_, expected);
}

TEST_F(DeepSeekTest, CountsDistinctRoutedExperts) { EXPECT_EQ(model_->experts_hit(2), 1); }

}  // namespace
}  // namespace flash_mla::model
