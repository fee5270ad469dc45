// Models with experts in 4 bits on the GPU against their dequantised twins and against the CPU.

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/config.h"
#include "engine_steps.h"
#include "flash_mla/error.h"
#include "model/model.h"
#include "model/random_checkpoint.h"
#include "model/temporary_directory.h"

namespace flash_mla::model {
namespace {

constexpr int kPages = 40;

/// Of a V3-like model whose sizes the kernels take; `shared` shared experts.
std::string config_of(int intermediate, int shared, bool int4) {
  std::string text =
      R"({"model_type": "deepseek_v3", "vocab_size": 160, "num_hidden_layers": 3, "max_position_embeddings": 2048,
          "hidden_size": 272, "intermediate_size": 336, "num_attention_heads": 8, "q_lora_rank": 144,
          "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
          "norm_topk_prob": true, "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
          "qk_rope_head_dim": 64, "v_head_dim": 128)";
  text += ", \"moe_intermediate_size\": " + std::to_string(intermediate) +
          ", \"n_shared_experts\": " + std::to_string(shared);
  if (int4) {
    text += R"(, "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int",
               "symmetric": true, "strategy": "group", "group_size": 128}}}})";
  }
  return text + "}";
}

struct Int4Case {
  const char* name;
  int intermediate, shared;
};
void PrintTo(const Int4Case& c, std::ostream* out) { *out << c.name; }

std::unique_ptr<Model> load(const TemporaryDirectory& directory, ModelDevice device,
                            ModelQuantize quantize = ModelQuantize::kNone) {
  ModelOptions options;
  options.device = device;
  options.precision = device == ModelDevice::kCpu ? ModelPrecision::kFloat32 : ModelPrecision::kBFloat16;
  options.quantize = quantize;
  options.num_threads = 8;
  std::unique_ptr<Model> model = load_model(directory.path(), options);
  model->allocate_cache(kPages);
  model->reserve(512, 64);
  return model;
}

/// A checkpoint in 4 bits and the same weights rounded to bfloat16.
class Int4Engine : public testing::TestWithParam<Int4Case> {
 protected:
  static void write(const TemporaryDirectory& directory, Stored stored) {
    const Int4Case& c = GetParam();
    directory.write("config.json", config_of(c.intermediate, c.shared, stored == Stored::kInt4));
    directory.write("model.safetensors",
                    RandomCheckpoint(checkpoint::read_config(directory.path()), stored).bytes());
  }
  void SetUp() override {
    write(int4_directory_, Stored::kInt4);
    write(twin_directory_, Stored::kDequantisedInt4);
  }
  /// A prompt in chunks of more and of fewer rows than the kernels of few take, and steps.
  static std::vector<float> run(Model& model, bool batch_invariant = false) {
    const Sequence s{random_tokens(300, 1), {3, 0, 7, 5, 1}};
    std::vector<float> out;
    std::vector<std::pair<int, int>> parts{{0, 150}, {150, 160}, {160, 240}, {240, 290}};
    for (int i = 290; i < 300; ++i) parts.push_back({i, i + 1});
    for (const auto& [begin, end] : parts) {
      const std::vector<float> more = forward(model, {{&s, begin, end}}, false, batch_invariant).logits;
      out.insert(out.end(), more.begin(), more.end());
    }
    return out;
  }

  TemporaryDirectory int4_directory_, twin_directory_;
};

// The twin's weights are rounded once more than those that kernels of few rows expand.
TEST_P(Int4Engine, AgreesWithItsDequantisedTwin) {
  const Fp8Rows never("0");
  const auto int4 = load(int4_directory_, ModelDevice::kCuda),
             twin = load(twin_directory_, ModelDevice::kCuda);
  for (const bool batch_invariant : {false, true}) {
    const std::vector<float> got = run(*int4, batch_invariant);
    expect_close(got, run(*twin, batch_invariant), GetParam().name, 2);
    EXPECT_EQ(got, run(*int4, batch_invariant));  // recorded steps are replayed
  }
}

TEST_P(Int4Engine, AgreesWithTheCpu) {
  const Fp8Rows never("0");
  const auto gpu = load(int4_directory_, ModelDevice::kCuda), cpu = load(int4_directory_, ModelDevice::kCpu);
  expect_close(run(*gpu), run(*cpu), GetParam().name);
}

// The prompt's chunks of 150 and of 80 tokens go through W4A8, whose inputs are quantised.
TEST_P(Int4Engine, ProductsInW4A8AgreeWithTheDequantisedTwin) {
  const auto twin = load(twin_directory_, ModelDevice::kCuda),
             int4 = load(int4_directory_, ModelDevice::kCuda);
  const Fp8Rows never("0");
  const auto plain = load(int4_directory_, ModelDevice::kCuda);
  const std::vector<float> got = run(*int4);
  expect_close(got, run(*twin), GetParam().name, 4);
  EXPECT_EQ(got, run(*int4));
#ifndef FLASH_MLA_EMULATED  // whose products know no W4A8
  EXPECT_NE(got, run(*plain));
#endif
  // Batch-invariant steps make none: rows may not decide.
  EXPECT_EQ(run(*int4, true), run(*plain, true));
}

// Two sequences in one batch-invariant step have the bits that they have alone.
TEST_P(Int4Engine, BatchInvariantStepsAreExact) {
  const auto model = load(int4_directory_, ModelDevice::kCuda);
  const Sequence a{random_tokens(90, 40), {15, 16}}, b{random_tokens(90, 41), {17, 18}};
  std::vector<float> alone;
  for (const Sequence* s : {&a, &b}) {
    const std::vector<float> logits = forward(*model, {{s, 0, 80}}, false, true).logits;
    alone.insert(alone.end(), logits.begin(), logits.end());
  }
  EXPECT_EQ(forward(*model, {{&a, 0, 80}, {&b, 0, 80}}, false, true).logits, alone);
}

// A checkpoint in bfloat16 quantised as it is loaded, here and on the CPU; and one in 4 bits, which stays as it is.
TEST_P(Int4Engine, QuantisesAtLoadAsTheCpuDoes) {
  const Fp8Rows never("0");
  const auto gpu = load(twin_directory_, ModelDevice::kCuda, ModelQuantize::kW4A8);
  const auto cpu = load(twin_directory_, ModelDevice::kCpu, ModelQuantize::kW4A8);
  expect_close(run(*gpu), run(*cpu), GetParam().name);
  const auto plain = load(int4_directory_, ModelDevice::kCuda);
  const auto asked = load(int4_directory_, ModelDevice::kCuda, ModelQuantize::kW4A8);
  EXPECT_EQ(run(*asked), run(*plain));
}

INSTANTIATE_TEST_SUITE_P(Models, Int4Engine,
                         testing::Values(Int4Case{"one_shared", 144, 1}, Int4Case{"two_shared", 128, 2}),
                         [](const auto& c) { return c.param.name; });

TEST(Int4Engines, SizesThatCannotBeQuantisedAreRefused) {
  const TemporaryDirectory directory;
  directory.write("config.json", config_of(96, 2, false));
  directory.write("model.safetensors", RandomCheckpoint(checkpoint::read_config(directory.path())).bytes());
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  options.quantize = ModelQuantize::kW4A8;
  const std::string message = message_of<Unsupported>([&] { load_model(directory.path(), options); });
  EXPECT_NE(message.find("quantize is w4a8: moe_intermediate_size is 96"), std::string::npos) << message;
}

TEST(Int4Engines, MadeUpWeightsRun) {
  const TemporaryDirectory directory;
  directory.write("config.json", config_of(128, 2, false));
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  options.quantize = ModelQuantize::kW4A8;
  const auto model = make_random_model(checkpoint::read_config(directory.path()), options);
  model->allocate_cache(kPages);
  model->reserve(512, 64);
  const Sequence s{random_tokens(200, 1), {3, 0, 7, 5}};
  for (const float x : forward(*model, {{&s, 0, 200}}).logits) ASSERT_TRUE(std::isfinite(x));
}

}  // namespace
}  // namespace flash_mla::model
