// Models with an indexer on the GPU against the CPU, whose index keys are then those of a GPU: contexts shorter and
// longer than index_topk, whole prompts, chunks and single steps, recorded steps of growing lengths, a long prompt.

#include <gtest/gtest.h>

#include <cstdlib>
#include <numeric>
#include <string>
#include <tuple>

#include "checkpoint/config.h"
#include "engine_steps.h"
#include "flash_mla/engine.h"
#include "flash_mla/error.h"
#include "model/model.h"
#include "model/random_checkpoint.h"
#include "model/temporary_directory.h"

namespace flash_mla::model {
namespace {

constexpr int kPages = 60;
// Where rounding lets one of two tokens in, with as good as equal scores, a random model goes on differently: kernels
// emulated on the host, in bfloat16, and the CPU in float32 differ by up to 0.11 in the median and 0.18 in nine rows of
// ten. Attention to the latest tokens instead, or to neighbours of the chosen ones, is off by 0.30 and more in the median.
constexpr double kWithChoices = 5, kLongWithChoices = 6;
// Up to index_topk tokens there is nothing to choose, and each row of the same comparison is within 0.010, or with an FP8
// cache 0.042.
constexpr double kWithoutChoices = 0.03, kFp8WithoutChoices = 0.1;

struct Case {
  std::string name;
  std::string fields;  // of config.json, besides the common ones
  ModelKvCache kv_cache = ModelKvCache::kAuto;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// Every token takes all experts: which of nearly equal ones it takes would be up to rounding, and a row with another one
// is off by as much as one that attends to other tokens. engine_test.cpp has the choice of experts.
std::string config_text(const std::string& fields) {
  return R"({"vocab_size": 160, "num_hidden_layers": 3, "max_position_embeddings": 2048, "hidden_size": 256,
    "intermediate_size": 320, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 4,
    "moe_intermediate_size": 96, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, )" +
         fields + "}";
}

std::vector<Case> cases() {
  // The dimensions that prefill has a kernel for.
  const std::string v32 = R"("model_type": "deepseek_v32", "num_attention_heads": 8, "q_lora_rank": 64,
    "routed_scaling_factor": 1.0, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "index_topk": 96, "index_n_heads": 16, "index_head_dim": 128)";
  // Others, and lists that are no whole number of tiles.
  const std::string odd = R"("model_type": "deepseek_v32", "num_attention_heads": 3, "q_lora_rank": 64,
    "routed_scaling_factor": 1.0, "qk_nope_head_dim": 64, "v_head_dim": 72,
    "index_topk": 70, "index_n_heads": 5, "index_head_dim": 64)";
  const std::string glm = R"("model_type": "glm_moe_dsa", "num_attention_heads": 4, "q_lora_rank": 64,
    "routed_scaling_factor": 1.0, "qk_nope_head_dim": 192, "v_head_dim": 256,
    "index_topk": 96, "index_n_heads": 32, "index_head_dim": 128, "indexer_types": ["full", "shared", "full"])";
  return {{"v32", v32},
          {"v32_odd", odd},
          {"glm", glm},
          {"v32_fp8", v32, ModelKvCache::kFp8},
          {"glm_fp8", glm, ModelKvCache::kFp8}};
}

std::unique_ptr<Model> load(const std::filesystem::path& directory, ModelDevice device, ModelKvCache kv_cache,
                            int pages, int most_tokens) {
  ModelOptions options;
  options.device = device;
  options.precision = device == ModelDevice::kCpu ? ModelPrecision::kFloat32 : ModelPrecision::kBFloat16;
  options.kv_cache = kv_cache;
  options.fp8_index_keys = true;
  options.num_threads = 8;
  std::unique_ptr<Model> model = load_model(directory, options);
  model->reserve(most_tokens, 64);
  model->allocate_cache(pages);
  return model;
}

class CudaSparseEngine : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    directory_.write("config.json", config_text(GetParam().fields));
    const ModelConfig config = checkpoint::read_config(directory_.path());
    directory_.write("model.safetensors", RandomCheckpoint(config).bytes());
    topk_ = config.index_topk;
    gpu_ = make(ModelDevice::kCuda);
    long_ = {random_tokens(300, 1), {3, 0, 7, 5, 1}};
    again_ = {long_.tokens, {10, 11, 12, 13, 14}};
  }
  std::unique_ptr<Model> make(ModelDevice device) const {
    return load(directory_.path(), device, GetParam().kv_cache, kPages, 512);
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Model> gpu_;
  Sequence long_, again_;
  int topk_ = 0;
};

// Shorter than index_topk, past it within a chunk, behind it, few tokens at once, and step after step.
TEST_P(CudaSparseEngine, AgreesWithTheCpu) {
  const std::unique_ptr<Model> cpu = make(ModelDevice::kCpu);
  for (const auto& [begin, end] :
       std::vector<std::pair<int, int>>{{0, 50}, {50, 66}, {66, 150}, {150, 280}, {280, 293}}) {
    const std::vector<Part> part{{&long_, begin, end}};
    const std::string what = GetParam().name + " " + std::to_string(begin);
    const std::vector<float> a = forward(*gpu_, part).logits, b = forward(*cpu, part).logits;
    if (end > topk_) {
      expect_close(a, b, what.c_str(), kWithChoices);
    } else {
      expect_all_close(a, b, what.c_str(),
                       GetParam().kv_cache == ModelKvCache::kFp8 ? kFp8WithoutChoices : kWithoutChoices);
    }
  }
  std::vector<float> ours, theirs;
  for (const auto& [begin, end] : {std::pair(topk_ - 6, topk_ + 6), std::pair(293, 300)}) {
    // Written anew, where the first loop has been already.
    for (int i = begin; i < end; ++i) {
      const std::vector<Part> part{{&long_, i, i + 1}};
      const std::vector<float> a = forward(*gpu_, part).logits, b = forward(*cpu, part).logits;
      ours.insert(ours.end(), a.begin(), a.end());
      theirs.insert(theirs.end(), b.begin(), b.end());
    }
  }
  expect_close(ours, theirs, (GetParam().name + " steps").c_str(), kWithChoices);
}

TEST_P(CudaSparseEngine, WholeChunksAndStepsAgree) {
  const std::vector<float> whole = forward(*gpu_, {{&long_, 0, 300}}).logits;
  std::vector<float> cut;
  std::vector<std::pair<int, int>> parts{{0, 70}, {70, 87}, {87, 103}, {103, 200}};
  for (int i = 200; i < 300; ++i) parts.push_back({i, i + 1});
  for (const auto& [begin, end] : parts) {
    const std::vector<float> more = forward(*gpu_, {{&again_, begin, end}}).logits;
    cut.insert(cut.end(), more.begin(), more.end());
  }
  expect_close(cut, whole, GetParam().name.c_str(), kWithChoices);
}

// Steps of all sizes, of short and long sequences, with prompts beside them: some of which end below index_topk, cross
// it, or begin behind it. Replayed steps give the same bits.
TEST_P(CudaSparseEngine, BatchesAgreeWithSequencesAlone) {
  std::vector<Sequence> sequences;
  std::vector<int> lengths;
  for (int i = 0; i < 9; ++i) {
    lengths.push_back(i % 2 == 0 ? 40 + i : 120 + i);
    sequences.push_back(
        {random_tokens(190, 20 + static_cast<unsigned>(i)), {3 * i + 15, 3 * i + 16, 3 * i + 17}});
  }
  std::vector<float> alone;
  std::vector<Part> steps;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    forward(*gpu_, {{&sequences[i], 0, lengths[i]}});
    steps.push_back({&sequences[i], lengths[i], lengths[i] + 1});
    const std::vector<float> row = forward(*gpu_, {steps.back()}).logits;
    alone.insert(alone.end(), row.begin(), row.end());
  }
  const auto rows = [&](std::size_t count) {
    return std::vector<float>(alone.begin(), alone.begin() + static_cast<std::ptrdiff_t>(count * kVocab));
  };
  for (const std::size_t count : {1, 2, 3, 5, 8, 9}) {
    const std::vector<Part> some(steps.begin(), steps.begin() + static_cast<std::ptrdiff_t>(count));
    const std::vector<float> together = forward(*gpu_, some).logits;
    expect_close(together, rows(count), GetParam().name.c_str(), kWithChoices);
    EXPECT_EQ(together, forward(*gpu_, some).logits) << count;
  }
  std::vector<Part> mixed(steps.begin(), steps.begin() + 4);
  mixed.push_back({&sequences[4], 0, 60});
  mixed.push_back({&long_, 0, 200});
  mixed.push_back({&sequences[5], 100, 125});
  mixed.push_back({&sequences[6], 0, 46});
  const std::vector<float> logits = forward(*gpu_, mixed).logits;
  expect_close({logits.begin(), logits.begin() + std::ptrdiff_t{4} * kVocab}, rows(4),
               GetParam().name.c_str(), kWithChoices);
  std::size_t at = 4;
  for (std::size_t i = 4; i < mixed.size(); ++i) {
    const Part& p = mixed[i];
    const auto first = logits.begin() + static_cast<std::ptrdiff_t>(at * kVocab);
    expect_close({first, first + static_cast<std::ptrdiff_t>(p.end - p.begin) * kVocab},
                 forward(*gpu_, {p}).logits, "a prompt beside others", kWithChoices);
    at += static_cast<std::size_t>(p.end - p.begin);
  }
}

// Steps of one token each, which are replayed while their sequence grows past index_topk, and a prompt, which is not
// recorded: in batch-invariant mode they have the same bits, and so has a sequence among others.
TEST_P(CudaSparseEngine, ReplayedStepsOfGrowingLengthsHaveTheBitsOfAPrompt) {
  const std::vector<float> whole = forward(*gpu_, {{&long_, 0, 300}}, false, true).logits;
  const Sequence other{random_tokens(300, 9), {20, 21, 22, 23, 24}};
  forward(*gpu_, {{&other, 0, 30}}, false, true);
  forward(*gpu_, {{&again_, 0, 60}}, false, true);
  int different = 0;
  for (int i = 60; i < 300; ++i) {
    std::vector<Part> parts{{&again_, i, i + 1}};
    if (i % 3 == 0) parts.push_back({&other, 30, 31});
    const std::vector<float> row = forward(*gpu_, parts, false, true).logits;
    const auto expected = whole.begin() + std::ptrdiff_t{i} * kVocab;
    different += std::equal(row.begin(), row.begin() + kVocab, expected) ? 0 : 1;
  }
  EXPECT_EQ(different, 0) << "of 240 rows";
}

// As long as the block table of a recorded step is wide enough, and longer.
TEST_P(CudaSparseEngine, StepsGrowPastTheRecordedTable) {
  const std::unique_ptr<Model> cpu = make(ModelDevice::kCpu);
  Sequence sequence{random_tokens(1100, 2), std::vector<std::int32_t>(18)};
  std::iota(sequence.pages.begin(), sequence.pages.end(), 25);
  for (Model* model : {gpu_.get(), cpu.get()}) {
    for (int at = 0; at < 1000; at += 500) forward(*model, {{&sequence, at, at + 500}});
  }
  std::vector<float> ours, theirs;
  for (int i = 1000; i < 1050; ++i) {
    const std::vector<float> a = forward(*gpu_, {{&sequence, i, i + 1}}).logits;
    const std::vector<float> b = forward(*cpu, {{&sequence, i, i + 1}}).logits;
    ours.insert(ours.end(), a.begin(), a.end());
    theirs.insert(theirs.end(), b.begin(), b.end());
  }
  expect_close(ours, theirs, GetParam().name.c_str(), kWithChoices);
}

TEST_P(CudaSparseEngine, ACopiedPageContinuesTheSequence) {
  forward(*gpu_, {{&long_, 0, 180}});
  const std::vector<float> expected = forward(*gpu_, {{&long_, 180, 181}}).logits;
  forward(*gpu_, {{&long_, 0, 180}});
  const Sequence copy{long_.tokens, {30, 31, 32}};
  for (std::size_t i = 0; i < copy.pages.size(); ++i) gpu_->copy_page(long_.pages[i], copy.pages[i]);
  const Sequence other{random_tokens(180, 3), long_.pages};
  forward(*gpu_, {{&other, 0, 180}});
  EXPECT_EQ(expected, forward(*gpu_, {{&copy, 180, 181}}).logits);
}

TEST_P(CudaSparseEngine, CountsTheBytesOfItsCache) {
  const ModelConfig config = checkpoint::read_config(directory_.path());
  std::size_t expected = 0;
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    expected += GetParam().kv_cache == ModelKvCache::kFp8 ? 656 : 576 * 2;
    if (config.has_indexer(i)) expected += static_cast<std::size_t>(config.index_head_dim) + 4;
  }
  EXPECT_EQ(gpu_->bytes_per_page(), 64 * expected);
  EXPECT_EQ(make(ModelDevice::kAuto)->bytes_per_page(),
            64 * expected);  // the GPU, where it can run the model
}

INSTANTIATE_TEST_SUITE_P(Models, CudaSparseEngine, testing::ValuesIn(cases()),
                         [](const auto& c) { return c.param.name; });

// A prompt of 20,000 tokens in chunks, and steps behind it.
TEST(CudaLongPrompt, AgreesWithTheCpu) {
  constexpr int kLength = 20000, kChunk = 4096, kSteps = 8;
  TemporaryDirectory directory;
  directory.write("config.json", R"({"model_type": "deepseek_v32", "vocab_size": 160, "num_hidden_layers": 2,
    "max_position_embeddings": 32768, "hidden_size": 64, "intermediate_size": 64, "n_routed_experts": null,
    "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "index_topk": 512, "index_n_heads": 4, "index_head_dim": 64})");
  directory.write("model.safetensors", RandomCheckpoint(checkpoint::read_config(directory.path())).bytes());
  constexpr int kLongPages = (kLength + kSteps) / 64 + 1;
  Sequence sequence{random_tokens(kLength + kSteps, 4), std::vector<std::int32_t>(kLongPages)};
  for (int i = 0; i < kLongPages; ++i) sequence.pages[static_cast<std::size_t>(i)] = kLongPages - 1 - i;
  for (const ModelKvCache kv_cache : {ModelKvCache::kAuto, ModelKvCache::kFp8}) {
    std::vector<std::vector<float>> rows;
    for (const ModelDevice device : {ModelDevice::kCuda, ModelDevice::kCpu}) {
      const std::unique_ptr<Model> model = load(directory.path(), device, kv_cache, kLongPages, kChunk);
      std::vector<float>& out = rows.emplace_back();
      for (int at = 0; at < kLength; at += kChunk) {
        const std::vector<float> logits =
            forward(*model, {{&sequence, at, std::min(at + kChunk, kLength)}}).logits;
        for (std::size_t row = 0; row < logits.size() / kVocab; row += 500) {
          out.insert(out.end(), logits.begin() + static_cast<std::ptrdiff_t>(row * kVocab),
                     logits.begin() + static_cast<std::ptrdiff_t>((row + 1) * kVocab));
        }
      }
      for (int i = kLength; i < kLength + kSteps; ++i) {
        const std::vector<float> logits = forward(*model, {{&sequence, i, i + 1}}).logits;
        out.insert(out.end(), logits.begin(), logits.end());
      }
    }
    expect_close(rows[0], rows[1], kv_cache == ModelKvCache::kFp8 ? "20,000 tokens, fp8" : "20,000 tokens",
                 kLongWithChoices);
  }
}

TEST(CudaIndexerSizes, AreRefusedByNameOrLeftToTheCpu) {
  const auto message = [](const std::string& from, const std::string& to) {
    std::string text = config_text(cases()[0].fields);
    text.replace(text.find(from), from.size(), to);
    const checkpoint::ModelConfig config = checkpoint::parse_config(text, "test");
    ModelOptions options;
    make_random_model(config, options);
    options.device = ModelDevice::kCuda;
    try {
      make_random_model(config, options);
    } catch (const Unsupported& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(
      message(R"("kv_lora_rank": 512)", R"("kv_lora_rank": 256)").find("kv_lora_rank is 256, expected 512"),
      std::string::npos);
  EXPECT_NE(message(R"("index_head_dim": 128)", R"("index_head_dim": 96)")
                .find("index_head_dim is 96, expected 64 or"),
            std::string::npos);
}

// The model of this repository with an indexer writes what it writes on the CPU, as far as rounding leaves it.
TEST(CudaSparseGeneration, TheSmallSparseModelWritesWhatItWritesOnTheCpu) {
  const char* directory = std::getenv("FLASH_MLA_SMALL_SPARSE_MODEL");
  ASSERT_NE(directory, nullptr) << "set FLASH_MLA_SMALL_SPARSE_MODEL to the folder models/small-sparse";
  std::string prompt = "It was a dark night and the wind blew from the sea.";
  for (int i = 0; i < 5; ++i)
    prompt += " The old man sat by the fire and told his story, as he had told it so often.";
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = 64;
  std::vector<std::vector<std::int32_t>> tokens;
  for (const auto& [device, kv_cache] : {std::tuple(EngineOptions::Device::kCpu, ModelKvCache::kAuto),
                                         std::tuple(EngineOptions::Device::kCuda, ModelKvCache::kAuto),
                                         std::tuple(EngineOptions::Device::kCpu, ModelKvCache::kFp8),
                                         std::tuple(EngineOptions::Device::kCuda, ModelKvCache::kFp8)}) {
    EngineOptions options;
    options.device = device;
    options.kv_cache = kv_cache;
    options.num_pages = 64;
    Engine engine(directory, options);
    const std::vector<Completion> out = engine.generate(std::vector<std::string>{prompt}, params);
    ASSERT_EQ(out[0].choices[0].error, "");
    tokens.push_back(out[0].choices[0].token_ids);
  }
  for (std::size_t i = 0; i < tokens.size(); i += 2) {
    const auto [a, b] =
        std::mismatch(tokens[i].begin(), tokens[i].end(), tokens[i + 1].begin(), tokens[i + 1].end());
    EXPECT_GE(a - tokens[i].begin(), 16) << "of 64 tokens, " << (i == 0 ? "bfloat16" : "fp8");
  }
}

}  // namespace
}  // namespace flash_mla::model
