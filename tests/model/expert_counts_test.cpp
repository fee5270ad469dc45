// How often a router has chosen its experts, against the rows that each expert's product takes.

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/config.h"
#include "model/model.h"
#include "random_checkpoint.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using Ids = std::vector<std::int32_t>;
using Counts = std::vector<std::int64_t>;

constexpr int kExperts = 10, kChosen = 3, kVocab = 131;
// A dense layer, then two mixtures, of which the last sees logit rows alone, then the module's.
constexpr const char* kConfig = R"({
  "model_type": "deepseek_v3", "vocab_size": 131, "hidden_size": 96, "intermediate_size": 100,
  "moe_intermediate_size": 41, "num_hidden_layers": 3, "num_attention_heads": 12, "q_lora_rank": 40,
  "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 10,
  "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
  "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "max_position_embeddings": 512,
  "rope_theta": 10000.0})";

class ExpertCountsOfAModel : public testing::Test {
 protected:
  ExpertCountsOfAModel() {
    const ModelConfig config = checkpoint::parse_config(kConfig, "test");
    directory_.write("config.json", kConfig);
    directory_.write("model.safetensors",
                     RandomCheckpoint(config, Stored::kBf16, /*with_module=*/true).bytes());
  }
  static ModelOptions options(int tp = 1) {
    ModelOptions out;
    out.device = ModelDevice::kCpu;
    out.precision = ModelPrecision::kFloat32;
    out.num_threads = 2;
    out.tp = tp;
    return out;
  }
  std::unique_ptr<Model> load(const ModelOptions& options) const {
    auto model = load_model(directory_.path(), options);
    model->allocate_cache(4);
    return model;
  }
  /// The `count` tokens of one sequence behind `before`, of which the last is chosen.
  static void step(Model& model, std::int32_t before, std::int32_t count, bool batch_invariant = false) {
    Ids ids;
    for (std::int32_t t = before; t < before + count; ++t) ids.push_back((t * t + 3 * t) % kVocab);
    const std::int32_t starts[] = {0, count}, lengths[] = {before + count}, rows[] = {count - 1};
    const Ids pages = {2, 0, 3};
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = pages;
    batch.max_blocks = 3;
    batch.greedy_rows = rows;
    batch.batch_invariant = batch_invariant;
    std::int32_t token = 0;
    model.forward(batch, nullptr, &token);
  }
  static void run(Model& model, bool batch_invariant = false) {
    step(model, 0, 100, batch_invariant);
    for (std::int32_t i = 100; i < 110; ++i) step(model, i, 1, batch_invariant);
  }

  TemporaryDirectory directory_;
};

std::int64_t sum(const Counts& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

TEST_F(ExpertCountsOfAModel, AreTheRowsOfTheExpertsProducts) {
  std::mutex mutex;
  std::map<std::string, std::int64_t> rows;  // by the product's first tensor
  ModelOptions watched = options();
  watched.on_product = [&](std::span<const std::string> tensors, const Matrix& in) {
    const std::lock_guard lock(mutex);
    rows[tensors[0]] += in.rows;
  };
  const auto model = load(watched);
  EXPECT_EQ(model->why_no_expert_counts(), "");
  run(*model);
  const std::vector<ExpertCounts> layers = model->expert_counts();
  ASSERT_EQ(layers.size(), 2u) << "the first layer is dense, the module is not loaded";
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const ExpertCounts& layer = layers[i];
    EXPECT_EQ(layer.layer, static_cast<int>(i) + 1);
    ASSERT_EQ(layer.counts.size(), std::size_t{kExperts});
    for (int e = 0; e < kExperts; ++e) {
      const std::string name =
          "model.layers." + std::to_string(layer.layer) + ".mlp.experts." + std::to_string(e);
      EXPECT_EQ(layer.counts[static_cast<std::size_t>(e)], rows[name + ".gate_proj.weight"]) << name;
    }
    EXPECT_EQ(layer.rank_counts, Counts{sum(layer.counts)});
  }
  EXPECT_EQ(sum(layers[0].counts), 110 * kChosen);
  EXPECT_EQ(sum(layers[1].counts), 11 * kChosen) << "of a prompt the last layer has the last token alone";
}

TEST_F(ExpertCountsOfAModel, HaveTheModuleWhereItIsLoaded) {
  ModelOptions with_module = options();
  with_module.draft_module = true;
  const auto model = load(with_module);
  run(*model);
  const std::vector<ExpertCounts> layers = model->expert_counts();
  ASSERT_EQ(layers.size(), 3u);
  EXPECT_EQ(layers[2].layer, 3);
  EXPECT_EQ(sum(layers[0].counts), 110 * kChosen);
  EXPECT_EQ(sum(layers[1].counts), 110 * kChosen) << "the module reads all that the last layer leaves";
  EXPECT_EQ(sum(layers[2].counts), 0);
}

TEST_F(ExpertCountsOfAModel, AreTheSameOnRanksWhichEachRunSome) {
  ModelOptions one_rank = options();
  one_rank.batch_invariant = true;
  const auto one = load(one_rank);
  run(*one, true);
  const std::vector<ExpertCounts> expected = one->expert_counts();
  for (const std::string placement : {"linear", "round-robin"}) {
    SCOPED_TRACE(placement);
    ModelOptions four = options(4);
    four.batch_invariant = true;
    four.expert_placement = placement;
    const auto model = load(four);
    run(*model, true);
    const std::vector<ExpertCounts> layers = model->expert_counts();
    ASSERT_EQ(layers.size(), expected.size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
      EXPECT_EQ(layers[i].layer, expected[i].layer);
      EXPECT_EQ(layers[i].counts, expected[i].counts);
      Counts of_ranks(4, 0);
      for (int e = 0; e < kExperts; ++e) {
        of_ranks[static_cast<std::size_t>(placement == "linear" ? e * 4 / kExperts : e % 4)] +=
            layers[i].counts[static_cast<std::size_t>(e)];
      }
      EXPECT_EQ(layers[i].rank_counts, of_ranks);
    }
  }
  // Where every rank has all experts, those of a step are shared out.
  ModelOptions replicas = options(2);
  replicas.ep = 1;
  const auto model = load(replicas);
  run(*model);
  for (const ExpertCounts& layer : model->expert_counts()) {
    EXPECT_EQ(sum(layer.rank_counts), sum(layer.counts));
    EXPECT_EQ(layer.rank_counts[0] > 0, sum(layer.counts) > 0);
    EXPECT_EQ(layer.rank_counts[1] > 0, sum(layer.counts) > 0);
  }
}

}  // namespace
}  // namespace flash_mla::model
