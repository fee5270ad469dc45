// A model on several ranks, which are streams of one GPU, against the same on one.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/cuda/check.h"
#include "base/element.h"
#include "checkpoint/config.h"
#include "comm/communicator.h"
#include "comm/thread_group.h"
#include "engine_steps.h"
#include "flash_mla/engine.h"
#include "flash_mla/error.h"
#include "model/deepseek.h"
#include "model/device/cuda/cuda_device.h"
#include "model/device/cuda/nccl_library.h"
#include "model/device/cuda/rank_exchange.h"
#include "model/device/cuda/stream.h"
#include "model/parallel/expert_placement.h"
#include "model/parallel/parallel_model.h"
#include "model/random_checkpoint.h"
#include "model/temporary_directory.h"
#include "model/weights.h"

namespace flash_mla::model {
namespace {

constexpr int kPages = 40;
#ifdef FLASH_MLA_EMULATED
constexpr int kFailures = 4, kGenerated = 12;
#else
constexpr int kFailures = 20, kGenerated = 48;
#endif

struct Case {
  std::string name, fields;
  Stored stored = Stored::kBf16;
  double times = 1;  ///< of expect_close
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::string config_text(const Case& c) {
  return R"({"vocab_size": 160, "num_hidden_layers": 3, "max_position_embeddings": 2048, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, )" +
         c.fields + "}";
}

std::vector<Case> cases() {
  const std::string v3 =
      R"("model_type": "deepseek_v3", "n_group": 2, "topk_group": 1, "norm_topk_prob": true, )";
  const std::string heads =
      R"("num_attention_heads": 8, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128)";
  const std::string experts =
      R"("hidden_size": 256, "intermediate_size": 320, "n_routed_experts": 10, "n_shared_experts": 2,
         "num_experts_per_tok": 4, "moe_intermediate_size": 96, )";
  const std::string whole_blocks =
      R"("hidden_size": 256, "intermediate_size": 512, "n_routed_experts": 10, "n_shared_experts": 2,
         "num_experts_per_tok": 4, "moe_intermediate_size": 128, )";
  // Every token takes all experts, where choices of tokens are up to rounding (sparse_engine_test.cpp).
  const std::string all_experts =
      R"("hidden_size": 256, "intermediate_size": 320, "n_routed_experts": 4, "n_shared_experts": 1,
         "num_experts_per_tok": 4, "moe_intermediate_size": 96, "n_group": 1, "topk_group": 1, "norm_topk_prob": true, )";
  return {
      {"v2",
       R"("model_type": "deepseek_v2", "q_lora_rank": null, "norm_topk_prob": false, )" + experts + heads},
      {"v2_plain",
       R"("model_type": "deepseek_v2", "q_lora_rank": null, "norm_topk_prob": false, "hidden_size": 64,
         "intermediate_size": 90, "n_routed_experts": 5, "n_shared_experts": 1, "num_experts_per_tok": 2,
         "moe_intermediate_size": 41, "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 24,
         "qk_rope_head_dim": 16, "v_head_dim": 40)"},
      {"v3",
       v3 + R"("q_lora_rank": 64, "topk_method": "noaux_tc", "attention_bias": true, )" + experts + heads},
      {"v3_fp8",
       v3 + R"("q_lora_rank": 128,
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, )" +
           whole_blocks + heads,
       Stored::kFp8, 4},
      {"v32",
       R"("model_type": "deepseek_v32", "q_lora_rank": 64, "index_topk": 96, "index_n_heads": 16,
         "index_head_dim": 128, )" +
           all_experts + heads,
       Stored::kBf16, 5},
  };
}

class CudaRanks : public testing::TestWithParam<Case> {
 protected:
  CudaRanks() {
    const std::string text = config_text(GetParam());
    directory_.write("config.json", text);
    directory_.write("model.safetensors", RandomCheckpoint(checkpoint::parse_config(text, "test"),
                                                           GetParam().stored, /*with_module=*/true)
                                              .bytes());
  }
  static ModelOptions on_ranks(int tp) {
    ModelOptions options;
    options.device = ModelDevice::kCuda;
    options.tp = tp;
    if (tp > 1) options.devices.assign(static_cast<std::size_t>(tp), 0);
    options.draft_module = true;
    return options;
  }
  std::unique_ptr<Model> load(const ModelOptions& options) const {
    std::unique_ptr<Model> model = load_model(directory_.path(), options);
    model->allocate_cache(kPages);
    model->reserve(512, 64);
    return model;
  }
  void expect_alike(Model& one, Model& many, const std::string& what) const;

  TemporaryDirectory directory_;
};
INSTANTIATE_TEST_SUITE_P(Models, CudaRanks, testing::ValuesIn(cases()),
                         [](const auto& c) { return c.param.name; });

// Prompts, chunks behind them, steps of several tokens and of one, recorded and replayed.
void CudaRanks::expect_alike(Model& one, Model& many, const std::string& what) const {
  const Sequence a{random_tokens(250, 1), {3, 0, 7, 5}}, b{random_tokens(100, 2), {11, 20}},
      c{random_tokens(100, 3), {12, 21}};
  std::vector<float> expected, got;
  const auto step = [&](const std::vector<Part>& parts) {
    for (const auto& [model, to] : {std::pair(&one, &expected), std::pair(&many, &got)}) {
      const std::vector<float> logits = forward(*model, parts).logits;
      to->insert(to->end(), logits.begin(), logits.end());
    }
  };
  step({{&a, 0, 150}});
  step({{&b, 0, 40}, {&c, 0, 61}});
  step({{&a, 150, 200}, {&b, 40, 41}, {&c, 61, 62}});
  for (int i = 0; i < 3; ++i) step({{&a, 200 + i, 201 + i}, {&b, 41 + i, 42 + i}, {&c, 62 + i, 63 + i}});
  for (int i = 0; i < 3; ++i) step({{&a, 203 + i, 204 + i}});
  expect_close(got, expected, (GetParam().name + " " + what).c_str(), GetParam().times);
  const std::vector<Part> again{{&a, 205, 206}};
  const std::vector<float> once = forward(many, again).logits;
  EXPECT_EQ(once, forward(many, again).logits);
  const std::vector<std::int32_t> token = forward(many, again, /*greedy=*/true).greedy;
  EXPECT_EQ(token[0], std::max_element(once.begin(), once.end()) - once.begin());
}

TEST_P(CudaRanks, SayWhatOneRankSays) {
  const std::unique_ptr<Model> one = load(on_ranks(1));
  const int heads = checkpoint::read_config(directory_.path()).num_attention_heads;
  for (const int tp : {2, 4, 8}) {
    if (heads % tp == 0) expect_alike(*one, *load(on_ranks(tp)), std::to_string(tp) + " ranks");
  }
}

TEST_P(CudaRanks, PlaceExpertsAsTheyAreTold) {
  const std::unique_ptr<Model> one = load(on_ranks(1));
  const int experts = checkpoint::read_config(directory_.path()).n_routed_experts;
  // On the last rank of 4 none, one everywhere, some twice.
  std::string layer = "[[0, 1, 2, 3]";
  for (int e = 1; e < experts; ++e) layer += e % 2 == 0 ? ", [2]" : ", [0, 1]";
  directory_.write("placement.json",
                   R"({"layers": {"1": )" + layer + R"(], "2": )" + layer + R"(], "3": )" + layer + "]}}");
  ModelOptions options = on_ranks(4);
  options.expert_placement = (directory_.path() / "placement.json").string();
  expect_alike(*one, *load(options), "placed");
  options.expert_placement = "round-robin";
  options.ep = 2;
  expect_alike(*one, *load(options), "ep 2");
}

TEST_P(CudaRanks, BatchInvariantStepsAreExact) {
  ModelOptions options = on_ranks(2);
  options.batch_invariant = true;
  options.ep = 1;
  const std::unique_ptr<Model> model = load(options);
  std::vector<Sequence> sequences;
  std::vector<Part> prompts, steps;
  for (int i = 0; i < 5; ++i)
    sequences.push_back({random_tokens(90, 40 + static_cast<unsigned>(i)), {2 * i + 15, 2 * i + 16}});
  std::vector<float> alone, alone_next;
  for (const Sequence& s : sequences) {
    const std::vector<float> rows = forward(*model, {{&s, 0, 70}}, false, true).logits;
    alone.insert(alone.end(), rows.begin(), rows.end());
    const std::vector<float> next = forward(*model, {{&s, 70, 71}}, false, true).logits;
    alone_next.insert(alone_next.end(), next.begin(), next.end());
    prompts.push_back({&s, 0, 70});
    steps.push_back({&s, 70, 71});
  }
  EXPECT_EQ(forward(*model, prompts, false, true).logits, alone);
  EXPECT_EQ(forward(*model, steps, false, true).logits, alone_next);
}

/// A rank that fails at its n-th step: before it, or behind.
class Failing : public DeepSeek {
 public:
  Failing(int fails_at, bool behind, ModelConfig config, std::unique_ptr<Device> device,
          WeightSource& weights)
      : DeepSeek(std::move(config), std::move(device), weights), fails_at_(fails_at), behind_(behind) {}
  void launch(const ForwardBatch& batch) override {
    const bool fails = steps_++ == fails_at_;
    if (fails && !behind_) throw std::runtime_error("the memory of the device is broken");
    DeepSeek::launch(batch);
    if (fails) throw std::runtime_error("the memory of the device is broken");
  }

 private:
  int fails_at_, steps_ = 0;
  bool behind_;
};

TEST_P(CudaRanks, EndWhereOneFails) {
  const ModelConfig config = checkpoint::read_config(directory_.path());
  const Checkpoint checkpoint = Checkpoint::open(directory_.path());
  const auto experts = std::make_shared<const ExpertPlacement>(config, 3 - 1, 2, "linear");
  const Sequence a{random_tokens(100, 1), {3, 0}};
  std::mt19937 random(1);
  for (int i = 0; i < kFailures; ++i) {
    const int failing = static_cast<int>(random() % 2), fails_at = static_cast<int>(random() % 6);
    const bool behind = random() % 2 == 0;
    ParallelModel model(2, [&](int rank, comm::Communicator& group) {
      const Partition partition{rank, 2, false, experts, false, rank, 2};
      auto device = make_cuda_device(partition.local(config), ModelQuantize::kNone, false, false,
                                     {partition, {&group, nullptr}, 0, 2});
      const auto weights = checkpoint_weights(config, checkpoint, device->weight_dtype(), partition);
      return std::make_unique<Failing>(rank == failing ? fails_at : -1, behind, partition.local(config),
                                       std::move(device), *weights);
    });
    model.allocate_cache(8);
    const auto begin = std::chrono::steady_clock::now();
    std::string message;
    int steps = 0;
    for (; steps < 8 && message.empty(); ++steps) {
      try {
        const int first = steps == 0 ? 0 : 30 + steps;
        forward(model, {{&a, first, 31 + steps}}, /*greedy=*/true);
      } catch (const comm::RankError& e) {
        message = e.what();
        EXPECT_EQ(e.rank(), failing);
      }
    }
    EXPECT_EQ(message, "rank " + std::to_string(failing) + ": the memory of the device is broken");
    EXPECT_EQ(steps, fails_at + 1);
    EXPECT_THROW(forward(model, {{&a, 40, 41}}, true), comm::RankError);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
  }
}

// The host's side of NCCL's calls with the one rank that one GPU takes.
TEST(CudaRankNccl, AddsUpAndGathers) {
  if (const std::string why = why_no_nccl(); !why.empty()) GTEST_SKIP() << why;
  comm::ThreadGroup group(1);
  const auto host = group.communicator(0);
  const Stream stream;
  const auto pool = std::make_shared<DevicePool>();
  const auto exchange = make_nccl_exchange(*host, *pool, stream);
  constexpr std::int64_t kRows = 5, kHidden = 264;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto on_gpu = [&](const std::vector<std::uint16_t>& values) {
    Buffer out = pool->allocate(values.size() * 2);
    check(cudaMemcpyAsync(out.data(), values.data(), values.size() * 2, cudaMemcpyHostToDevice, stream),
          "copy");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return out;
  };
  std::vector<std::uint16_t> x(kRows * kHidden), partial(x.size()), expected(x.size()), got(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = to_bf16(normal(random)).bits;
    partial[i] = to_bf16(normal(random)).bits;
    expected[i] = to_bf16(to_float(Bf16{x[i]}) + to_float(Bf16{partial[i]})).bits;
  }
  const Buffer on_x = on_gpu(x), on_partial = on_gpu(partial);
  const Matrix rows{on_x.data(), DType::kBFloat16, kRows, kHidden, kHidden};
  exchange->add_sum({on_partial.data(), DType::kBFloat16, kRows, kHidden, kHidden}, rows, {});
  const std::vector<Range> parts{{0, kHidden / 2}};
  exchange->gather_columns({on_x.data(), DType::kFloat32, kRows, kHidden / 2, kHidden / 2}, parts);
  check(cudaMemcpyAsync(got.data(), on_x.data(), got.size() * 2, cudaMemcpyDeviceToHost, stream), "copy");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  EXPECT_EQ(got, expected);
  exchange->check();
  exchange->fail();
  EXPECT_THROW(exchange->check(), comm::RankError);
}

TEST(CudaRankOptions, AreRefused) {
  TemporaryDirectory directory;
  const Case c = cases()[1];
  directory.write("config.json", config_text(c));
  directory.write("model.safetensors",
                  RandomCheckpoint(checkpoint::read_config(directory.path()), c.stored).bytes());
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  const auto refusal = [&] {
    try {
      load_models(directory.path(), options);
    } catch (const std::exception& e) {
      return std::string(e.what());
    }
    return std::string("nothing");
  };
  options.tp = 2;
  options.devices = {0};
  EXPECT_EQ(refusal(), "devices has 1 GPUs, expected 2, one for each rank");
  options.devices = {1, 0};
  EXPECT_EQ(refusal(), "devices[0] is 1, expected 0 (CUDA_VISIBLE_DEVICES says which GPU that is)");
  options.devices = {0, 99};
  EXPECT_EQ(refusal().substr(0, 27), "devices[1] is 99, expected ");
  options.devices.clear();
  options.tp = 1;
  options.dp = 2;
  EXPECT_EQ(refusal(), "dp is 2: on device cuda all ranks have the same tokens so far; use tp or device cpu");
}

TEST(CudaRankGeneration, TheSmallModelWritesWhatOneRankWrites) {
  const char* directory = std::getenv("FLASH_MLA_SMALL_MODEL");
  ASSERT_NE(directory, nullptr) << "set FLASH_MLA_SMALL_MODEL to the folder models/small";
  const std::vector<std::string> prompts = {"The", "Once upon a time", "It was a dark night and",
                                            "\"Why,\" said"};
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = kGenerated;
  std::vector<std::vector<Completion>> out;
  for (const int tp : {1, 2}) {
    EngineOptions options;
    options.device = EngineOptions::Device::kCuda;
    options.num_pages = 64;
    options.tp = tp;
    if (tp > 1) options.devices = {0, 0};
    Engine engine(directory, options);
    out.push_back(engine.generate(prompts, params));
  }
  // Sums over ranks are rounded once more, so that a token as likely as another may come instead.
  int same = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto& one = out[0][i].choices[0].token_ids;
    const auto& two = out[1][i].choices[0].token_ids;
    ASSERT_FALSE(two.empty()) << out[1][i].choices[0].error;
    const auto [a, b] = std::mismatch(one.begin(), one.end(), two.begin(), two.end());
    same += static_cast<int>(a - one.begin());
    EXPECT_GE(a - one.begin(), 8) << out[0][i].choices[0].text << "\n--- and\n" << out[1][i].choices[0].text;
  }
  std::printf("tokens alike: %d of %d\n", same, 4 * kGenerated);
  EXPECT_GE(same, 2 * kGenerated);
}

}  // namespace
}  // namespace flash_mla::model
