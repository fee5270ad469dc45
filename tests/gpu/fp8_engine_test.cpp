// Models with weights in FP8 on the GPU against their dequantised twins and against the CPU.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
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
constexpr const char* kRealHeads =
    R"("kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128)";

/// Of a V3-like model whose sizes the kernels of e4m3 take; `shared` shared experts.
std::string fp8_config(int intermediate, int shared, const char* quantization) {
  const std::string text =
      R"({"model_type": "deepseek_v3", "vocab_size": 160, "num_hidden_layers": 3, "max_position_embeddings": 2048,
          "hidden_size": 272, "intermediate_size": 336, "num_attention_heads": 8, "q_lora_rank": 144,
          "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
          "norm_topk_prob": true, "routed_scaling_factor": 1.0, )";
  return text + kRealHeads + ", \"moe_intermediate_size\": " + std::to_string(intermediate) +
         ", \"n_shared_experts\": " + std::to_string(shared) + quantization + "}";
}
constexpr const char* kFp8Config =
    R"(, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]})";

struct Fp8Case {
  const char* name;
  int intermediate, shared;
  Stored stored, twin;
};
void PrintTo(const Fp8Case& c, std::ostream* out) { *out << c.name; }

/// A checkpoint in FP8 and the same weights rounded to bfloat16, both on the GPU.
class Fp8Engine : public testing::TestWithParam<Fp8Case> {
 protected:
  static std::unique_ptr<Model> load(const TemporaryDirectory& directory, ModelDevice device,
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
  static void write(const TemporaryDirectory& directory, Stored stored) {
    const Fp8Case& c = GetParam();
    const bool fp8 = stored == Stored::kFp8 || stored == Stored::kFp8Powers;
    directory.write("config.json", fp8_config(c.intermediate, c.shared, fp8 ? kFp8Config : ""));
    directory.write("model.safetensors",
                    RandomCheckpoint(checkpoint::read_config(directory.path()), stored).bytes());
  }
  void SetUp() override {
    write(fp8_directory_, GetParam().stored);
    write(twin_directory_, GetParam().twin);
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

  TemporaryDirectory fp8_directory_, twin_directory_;
};

// Where scales are no powers of two the twin's weights are rounded once more than those that kernels of few rows expand.
TEST_P(Fp8Engine, AgreesWithItsDequantisedTwin) {
  const Fp8Rows never("0");
  const double times = GetParam().stored == Stored::kFp8Powers ? 1 : 2;
  const auto fp8 = load(fp8_directory_, ModelDevice::kCuda), twin = load(twin_directory_, ModelDevice::kCuda);
  for (const bool batch_invariant : {false, true}) {
    const std::vector<float> got = run(*fp8, batch_invariant);
    expect_close(got, run(*twin, batch_invariant), GetParam().name, times);
    EXPECT_EQ(got, run(*fp8, batch_invariant));  // recorded steps are replayed
  }
}

TEST_P(Fp8Engine, AgreesWithTheCpu) {
  const Fp8Rows never("0");
  const auto gpu = load(fp8_directory_, ModelDevice::kCuda), cpu = load(fp8_directory_, ModelDevice::kCpu);
  expect_close(run(*gpu), run(*cpu), GetParam().name);
}

// The prompt's chunks of 150 and of 80 tokens go through products in FP8, whose inputs are quantised as well.
TEST_P(Fp8Engine, ProductsInFp8AgreeWithTheDequantisedTwin) {
  const auto twin = load(twin_directory_, ModelDevice::kCuda), fp8 = load(fp8_directory_, ModelDevice::kCuda);
  const Fp8Rows never("0");
  const auto plain = load(fp8_directory_, ModelDevice::kCuda);
  const std::vector<float> got = run(*fp8), want = run(*twin);
  expect_close(got, want, GetParam().name, 8);
  EXPECT_EQ(got, run(*fp8));
  EXPECT_NE(got, run(*plain));
  // Batch-invariant steps make none: rows may not decide.
  EXPECT_EQ(run(*fp8, true), run(*plain, true));
}

// Two sequences in one batch-invariant step have the bits that they have alone.
TEST_P(Fp8Engine, BatchInvariantStepsAreExact) {
  const auto model = load(fp8_directory_, ModelDevice::kCuda);
  const Sequence a{random_tokens(90, 40), {15, 16}}, b{random_tokens(90, 41), {17, 18}};
  std::vector<float> alone;
  for (const Sequence* s : {&a, &b}) {
    const std::vector<float> logits = forward(*model, {{s, 0, 80}}, false, true).logits;
    alone.insert(alone.end(), logits.begin(), logits.end());
  }
  EXPECT_EQ(forward(*model, {{&a, 0, 80}, {&b, 0, 80}}, false, true).logits, alone);
}

// A checkpoint in bfloat16 quantised as it is loaded, here and on the CPU.
TEST_P(Fp8Engine, QuantisesAtLoadAsTheCpuDoes) {
  const Fp8Rows never("0");
  const auto gpu = load(twin_directory_, ModelDevice::kCuda, ModelQuantize::kFp8);
  const auto cpu = load(twin_directory_, ModelDevice::kCpu, ModelQuantize::kFp8);
  expect_close(run(*gpu), run(*cpu), GetParam().name);
}

INSTANTIATE_TEST_SUITE_P(Models, Fp8Engine,
                         testing::Values(Fp8Case{"one_shared", 144, 1, Stored::kFp8, Stored::kDequantised},
                                         Fp8Case{"two_shared", 128, 2, Stored::kFp8, Stored::kDequantised},
                                         Fp8Case{"powers", 128, 2, Stored::kFp8Powers,
                                                 Stored::kDequantisedPowers}),
                         [](const auto& c) { return c.param.name; });

TEST(Fp8Engines, SizesThatCannotBeQuantisedAreRefused) {
  const TemporaryDirectory directory;
  directory.write("config.json", fp8_config(96, 2, ""));
  directory.write("model.safetensors", RandomCheckpoint(checkpoint::read_config(directory.path())).bytes());
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  options.quantize = ModelQuantize::kFp8;
  EXPECT_NE(message_of<Unsupported>([&] {
              load_model(directory.path(), options);
            }).find("moe_intermediate_size is 96"),
            std::string::npos);
}

TEST(Fp8Engines, ANumberOfRowsThatIsNoneIsRefused) {
  const TemporaryDirectory directory;
  directory.write("config.json", fp8_config(128, 2, ""));
  directory.write("model.safetensors", RandomCheckpoint(checkpoint::read_config(directory.path())).bytes());
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  const Fp8Rows rows("many");
  const std::string message = message_of<InvalidArgument>([&] { load_model(directory.path(), options); });
  EXPECT_NE(message.find("FLASH_MLA_FP8_ROWS is \"many\""), std::string::npos) << message;
}

TEST(Fp8Engines, MadeUpWeightsRun) {
  const TemporaryDirectory directory;
  directory.write("config.json", fp8_config(128, 2, ""));
  ModelOptions options;
  options.device = ModelDevice::kCuda;
  options.quantize = ModelQuantize::kFp8;
  const auto model = make_random_model(checkpoint::read_config(directory.path()), options);
  model->allocate_cache(kPages);
  model->reserve(512, 64);
  const Sequence s{random_tokens(200, 1), {3, 0, 7, 5}};
  for (const float x : forward(*model, {{&s, 0, 200}}).logits) ASSERT_TRUE(std::isfinite(x));
}

}  // namespace
}  // namespace flash_mla::model
