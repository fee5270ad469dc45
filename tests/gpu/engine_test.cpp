// The engine on the GPU against the engine on the CPU, on random checkpoints of every kind of model, and
// every way of cutting its work against the others.

#include "flash_mla/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>

#include "checkpoint/config.h"
#include "engine_steps.h"
#include "kernels/sampling/cpu/draw.h"
#include "model/model.h"
#include "model/random_checkpoint.h"
#include "model/temporary_directory.h"

namespace flash_mla::model {
namespace {

constexpr int kPages = 40;

struct Case {
  const char* name;
  const char* fields;  // of config.json, besides the common ones
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

constexpr const char* kYarn =
    R"("rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
       "mscale_all_dim": 0.707, "original_max_position_embeddings": 128})";
constexpr const char* kSmallHeads =
    R"("kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 40)";
constexpr const char* kOddHeads =
    R"("kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5)";
constexpr const char* kRealHeads =
    R"("kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128)";

std::string config_text(const Case& c) {
  return std::string("{\"vocab_size\": 160, \"num_hidden_layers\": 3, \"max_position_embeddings\": 2048, ") +
         c.fields + "}";
}

const std::vector<Case>& cases() {
  static const std::vector<std::string> kText = [] {
    const std::string v2 = R"("model_type": "deepseek_v2", )", v3 = R"("model_type": "deepseek_v3", )";
    const std::string wide = R"("hidden_size": 256, "intermediate_size": 320, )";
    const std::string experts =
        R"("n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 96,
           "first_k_dense_replace": 1, )";
    return std::vector<std::string>{
        // Dense, odd sizes, bias.
        v2 +
            R"("n_routed_experts": null, "hidden_size": 30, "intermediate_size": 23, "num_attention_heads": 3, "q_lora_rank": 10,
                "attention_bias": true, )" +
            kOddHeads,
        // V2-Lite: greedy softmax routing, no q_lora, YaRN, the real head dimensions.
        v2 + wide + experts + R"("num_attention_heads": 16, "q_lora_rank": null, "routed_scaling_factor": 1.0,
                "norm_topk_prob": false, )" +
            kRealHeads + ", " + kYarn,
        // V2: groups.
        v2 + wide + experts +
            R"("num_attention_heads": 4, "q_lora_rank": 48, "topk_method": "group_limited_greedy",
                "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0,
                "norm_topk_prob": false, )" +
            kSmallHeads,
        // V3: sigmoid, bias correction.
        v3 + wide + experts + R"("num_attention_heads": 8, "q_lora_rank": 64, "topk_method": "noaux_tc",
                "n_group": 4, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5, )" +
            kRealHeads,
        // V3 with one head and plain kernels.
        v3 + wide + experts + R"("num_attention_heads": 1, "q_lora_rank": 32, "n_group": 2, "topk_group": 1,
                "norm_topk_prob": true, "routed_scaling_factor": 1.0, )" +
            kSmallHeads + ", " + kYarn,
        // Unpaired rope and latent dimensions of the decode kernel without those of the prefill kernel.
        v3 + wide + experts + R"("num_attention_heads": 4, "q_lora_rank": 32, "n_group": 1, "topk_group": 1,
                "norm_topk_prob": true, "routed_scaling_factor": 1.0, "rope_interleave": false, "kv_lora_rank": 512, "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 64, "v_head_dim": 64)",
    };
  }();
  static const std::vector<Case> kCases = {
      {"dense_odd", kText[0].c_str()}, {"v2_lite", kText[1].c_str()},  {"v2_groups", kText[2].c_str()},
      {"v3", kText[3].c_str()},        {"v3_plain", kText[4].c_str()}, {"v3_unpaired", kText[5].c_str()}};
  return kCases;
}

class CudaEngine : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    directory_.write("config.json", config_text(GetParam()));
    directory_.write("model.safetensors",
                     RandomCheckpoint(checkpoint::read_config(directory_.path())).bytes());
    gpu_ = load(ModelDevice::kCuda);
    long_ = {random_tokens(300, 1), {3, 0, 7, 5, 1}};
    again_ = {long_.tokens, {10, 11, 12, 13, 14}};
  }
  std::unique_ptr<Model> load(ModelDevice device) const {
    ModelOptions options;
    options.device = device;
    options.precision = device == ModelDevice::kCpu ? ModelPrecision::kFloat32 : ModelPrecision::kBFloat16;
    options.num_threads = 8;
    std::unique_ptr<Model> model = load_model(directory_.path(), options);
    model->allocate_cache(kPages);
    model->reserve(512, 64);
    return model;
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Model> gpu_;
  Sequence long_, again_;
};

TEST_P(CudaEngine, AgreesWithTheCpu) {
  const std::unique_ptr<Model> cpu = load(ModelDevice::kCpu);
  for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 150}, {150, 280}, {280, 293}}) {
    const std::vector<Part> part{{&long_, begin, end}};
    expect_close(forward(*gpu_, part).logits, forward(*cpu, part).logits,
                 (std::string(GetParam().name) + " " + std::to_string(begin)).c_str());
  }
  int far = 0;
  for (int i = 293; i < 300; ++i) {
    const std::vector<Part> part{{&long_, i, i + 1}};
    const std::vector<double> error = row_errors(forward(*gpu_, part).logits, forward(*cpu, part).logits);
    far += error[0] > 0.1;
  }
  EXPECT_LE(far, 1);
}

TEST_P(CudaEngine, WholeChunksAndStepsAgree) {
  const std::vector<float> whole = forward(*gpu_, {{&long_, 0, 300}}).logits;
  std::vector<float> cut;
  std::vector<std::pair<int, int>> parts{{0, 70}, {70, 87}, {87, 103}, {103, 200}};
  for (int i = 200; i < 300; ++i) parts.push_back({i, i + 1});
  for (const auto& [begin, end] : parts) {
    const std::vector<float> more = forward(*gpu_, {{&again_, begin, end}}).logits;
    cut.insert(cut.end(), more.begin(), more.end());
  }
  expect_close(cut, whole, GetParam().name);
}

// Steps of all sizes, padded or not, with prefill beside decoding; replayed steps give the same bits.
TEST_P(CudaEngine, BatchesAgreeWithSequencesAlone) {
  std::vector<Sequence> sequences;
  for (int i = 0; i < 11; ++i) {
    sequences.push_back({random_tokens(100, 20 + static_cast<unsigned>(i)), {2 * i + 15, 2 * i + 16}});
  }
  const auto batch = [&](int count, int begin, int end) {
    std::vector<Part> parts;
    for (int i = 0; i < count; ++i)
      parts.push_back({&sequences[static_cast<std::size_t>(i)], begin + i, end + i});
    return parts;
  };
  std::vector<float> alone;
  for (const Sequence& s : sequences) {
    const auto i = static_cast<int>(&s - sequences.data());
    forward(*gpu_, {{&s, 0, 60 + i}});
    const std::vector<float> row = forward(*gpu_, {{&s, 60 + i, 61 + i}}).logits;
    alone.insert(alone.end(), row.begin(), row.end());
  }
  for (const int count : {1, 2, 3, 5, 8, 11}) {
    const std::vector<float> together = forward(*gpu_, batch(count, 60, 61)).logits;
    const std::vector<float> first(alone.begin(), alone.begin() + count * kVocab);
    expect_close(together, first, GetParam().name);
    EXPECT_EQ(together, forward(*gpu_, batch(count, 60, 61)).logits) << count;
    const std::vector<std::int32_t> greedy = forward(*gpu_, batch(count, 60, 61), true).greedy;
    for (int i = 0; i < count; ++i) {
      const float* row = together.data() + i * kVocab;
      EXPECT_EQ(greedy[static_cast<std::size_t>(i)], std::max_element(row, row + kVocab) - row) << count;
    }
  }
  std::vector<Part> mixed = batch(4, 60, 61);
  mixed.push_back({&long_, 0, 200});
  const std::vector<float> logits = forward(*gpu_, mixed).logits;
  expect_close({logits.begin(), logits.begin() + 4 * kVocab}, {alone.begin(), alone.begin() + 4 * kVocab},
               GetParam().name);
}

// Steps that check drafts: as many tokens of every sequence, which attend as one request, or fewer of some; of one
// sequence, and of as many tokens of several.
TEST_P(CudaEngine, AFewTokensOfASequenceAgreeWithStepsOfOne) {
  constexpr int kTokens = 5;
  std::vector<Sequence> sequences;
  std::vector<std::vector<float>> alone;  // of every sequence, the logits of each token behind its prompt
  const auto prompt = [](std::size_t i) { return 61 + 5 * static_cast<int>(i); };
  for (std::size_t i = 0; i < 9; ++i) {
    const int page = 4 * static_cast<int>(i);
    sequences.push_back({random_tokens(140, 40 + static_cast<unsigned>(i)), {page + 2, page, page + 3}});
    forward(*gpu_, {{&sequences[i], 0, prompt(i)}});
    std::vector<float>& rows = alone.emplace_back();
    for (int t = 0; t < kTokens; ++t) {
      const auto row = forward(*gpu_, {{&sequences[i], prompt(i) + t, prompt(i) + t + 1}}).logits;
      rows.insert(rows.end(), row.begin(), row.end());
    }
  }
  const auto check = [&](const std::vector<int>& counts) {
    std::vector<Part> parts;
    std::vector<float> expected;
    std::string what = GetParam().name;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      parts.push_back({&sequences[i], prompt(i), prompt(i) + counts[i]});
      expected.insert(expected.end(), alone[i].begin(), alone[i].begin() + counts[i] * kVocab);
      what.append(" ").append(std::to_string(counts[i]));
    }
    const std::vector<float> together = forward(*gpu_, parts).logits;
    expect_close(together, expected, what.c_str());
    EXPECT_EQ(together, forward(*gpu_, parts).logits) << "a replayed step, " << what;
  };
  const std::vector<int> eight_of_three(8, 3), nine_of_two(9, 2), eight_of_four(8, 4);
  const std::vector<std::vector<int>> all = {
      {2},       {1, 1},         {2},         {3},          {4},    {1, 1, 1, 1}, {2, 2}, {4}, {5}, {4, 4},
      {3, 3, 3}, eight_of_three, nine_of_two, {2, 1, 2, 1}, {1, 3}, eight_of_four};
  for (const std::vector<int>& counts : all) {
    check(counts);
  }
}

TEST_P(CudaEngine, BatchInvariantStepsAreExact) {
  std::vector<Sequence> sequences;
  std::vector<std::vector<float>> alone;
  for (int i = 0; i < 6; ++i) {
    sequences.push_back({random_tokens(90, 40 + static_cast<unsigned>(i)), {2 * i + 15, 2 * i + 16}});
  }
  for (const Sequence& s : sequences) {
    alone.push_back(forward(*gpu_, {{&s, 0, 80}}, false, true).logits);
    const std::vector<float> next = forward(*gpu_, {{&s, 80, 81}}, false, true).logits;
    alone.back().insert(alone.back().end(), next.begin(), next.end());
  }
  std::vector<Part> prompts, steps;
  for (const Sequence& s : sequences) {
    prompts.push_back({&s, 0, 80});
    steps.push_back({&s, 80, 81});
  }
  const std::vector<float> together = forward(*gpu_, prompts, false, true).logits;
  const std::vector<float> next = forward(*gpu_, steps, false, true).logits;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const std::size_t size = 80 * kVocab;
    EXPECT_EQ(0, std::memcmp(together.data() + i * size, alone[i].data(), size * sizeof(float))) << i;
    EXPECT_EQ(0, std::memcmp(next.data() + i * kVocab, alone[i].data() + size, kVocab * sizeof(float))) << i;
  }
}

TEST_P(CudaEngine, ACopiedPageContinuesTheSequence) {
  forward(*gpu_, {{&long_, 0, 50}});
  const std::vector<float> expected = forward(*gpu_, {{&long_, 50, 51}}).logits;
  forward(*gpu_, {{&long_, 0, 50}});
  gpu_->copy_page(long_.pages[0], 30);
  const Sequence copy{long_.tokens, {30}};
  EXPECT_EQ(expected, forward(*gpu_, {{&copy, 50, 51}}).logits);
}

Draw random_draw(std::mt19937& random) {
  const auto chance = [&] { return static_cast<double>(random() % 1000) / 1000; };
  const double u = chance(), temperature = 0.1 + 2 * chance();
  const int top_k = random() % 2 == 0 ? static_cast<int>(random() % 200) : 0;
  const double top_p = random() % 2 == 0 ? 0.05 + 0.95 * chance() : 1;
  return cpu::make_draw(u, temperature, top_k, top_p, random() % 3 == 0 ? chance() / 2 : 0);
}

/// Rules of some rows, with what they refer to.
struct Rules {
  Rules(std::size_t rows, std::mt19937& random) : masks(rows), biases(rows), rules(rows) {
    for (std::size_t i = 0; i < rows; ++i) {
      if (random() % 4 != 0) {
        for (int w = 0; w < (kVocab + 31) / 32; ++w) masks[i].push_back(static_cast<std::uint32_t>(random()));
        if (random() % 8 == 0) std::ranges::fill(masks[i], 0u);
        rules[i].allowed = masks[i].data();
      }
      for (std::int32_t t = 0; t < kVocab && random() % 2 == 0;
           t += static_cast<std::int32_t>(random() % 40)) {
        biases[i].push_back({t, static_cast<float>(random() % 200) / 10 - 10});
      }
      rules[i].biases = biases[i];
    }
  }
  /// The token of row i: of `logits`, changed by its rule; -1 where that leaves none.
  std::int32_t token(std::size_t i, std::span<const float> logits, const Draw& draw) const {
    std::vector<float> row(logits.begin(), logits.end());
    cpu::apply_rule(row, rules[i]);
    const auto best = std::ranges::max_element(row);
    if (std::isinf(*best)) return -1;
    cpu::DrawScratch scratch;
    return draw.scale > 0 ? cpu::draw_token(row, *best, draw, scratch)
                          : static_cast<std::int32_t>(best - row.begin());
  }

  std::vector<std::vector<std::uint32_t>> masks;
  std::vector<std::vector<TokenBias>> biases;
  std::vector<TokenRule> rules;
};

// Tokens that rules allow are chosen as the CPU does, in steps that are replayed and ones that are not, beside rows of
// logits, with steps without rules in between.
TEST_P(CudaEngine, ChoosesUnderRulesWhatTheCpuChooses) {
  std::mt19937 random(19);
  std::vector<Sequence> sequences;
  for (int i = 0; i < 9; ++i) {
    sequences.push_back({random_tokens(70, 60 + static_cast<unsigned>(i)), {2 * i + 15, 2 * i + 16}});
    forward(*gpu_, {{&sequences.back(), 0, 65}});
  }
  ASSERT_TRUE(gpu_->draws_take_masks());
  for (const int count : {1, 3, 9}) {
    std::vector<Part> parts;
    for (int i = 0; i < count; ++i) parts.push_back({&sequences[static_cast<std::size_t>(i)], 65, 66});
    for (int round = 0; round < 4; ++round) {
      const std::vector<float> logits = forward(*gpu_, parts).logits;
      const Rules rules(parts.size(), random);
      std::vector<Draw> draws(parts.size());
      for (Draw& d : draws) d = random_draw(random);
      const std::vector<std::int32_t> greedy = forward(*gpu_, parts, true, false, {}, rules.rules).greedy;
      const std::vector<std::int32_t> plain = forward(*gpu_, parts, true).greedy;
      const std::vector<std::int32_t> drawn = forward(*gpu_, parts, false, false, draws, rules.rules).greedy;
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const std::span row(logits.data() + i * kVocab, kVocab);
        EXPECT_EQ(greedy[i], rules.token(i, row, Draw())) << count << " " << i;
        EXPECT_EQ(drawn[i], rules.token(i, row, draws[i])) << count << " " << i;
        EXPECT_EQ(plain[i], std::ranges::max_element(row) - row.begin()) << count << " " << i;
      }
    }
  }
}

// A prompt's logits and tokens under rules in one step, which is not recorded.
TEST_P(CudaEngine, RulesLeaveRowsOfLogitsAlone) {
  std::mt19937 random(20);
  std::vector<std::int32_t> ids(long_.tokens.begin(), long_.tokens.begin() + 40);
  const std::int32_t starts[] = {0, 40}, lengths[] = {40}, rows[] = {7, 39}, chosen[] = {39};
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = std::span(long_.pages).first(1);
  batch.max_blocks = 1;
  batch.logit_rows = rows;
  batch.drawn_rows = chosen;
  batch.greedy_rows = chosen;
  batch.masked = true;
  for (int round = 0; round < 4; ++round) {
    const Draw draws[] = {random_draw(random)};
    batch.draws = draws;
    const Rules rules(2, random);
    gpu_->launch(batch);
    gpu_->choose(rules.rules);
    std::vector<float> logits(std::size_t{2} * kVocab);
    std::int32_t tokens[2];
    gpu_->collect(logits.data(), tokens);
    const std::span last = std::span<const float>(logits).last(kVocab);
    EXPECT_TRUE(std::ranges::all_of(logits, [](float x) { return std::isfinite(x); }));
    EXPECT_EQ(tokens[0], rules.token(0, last, draws[0]));
    EXPECT_EQ(tokens[1], rules.token(1, last, Draw()));
  }
}

// Drawn tokens are those that the CPU draws from the very logits that the GPU hands out.
TEST_P(CudaEngine, DrawsWhatTheCpuDraws) {
  std::mt19937 random(9);
  std::vector<Sequence> sequences;
  std::vector<Part> parts;
  for (int i = 0; i < 9; ++i) {
    sequences.push_back({random_tokens(70, 60 + static_cast<unsigned>(i)), {2 * i + 15, 2 * i + 16}});
  }
  for (const Sequence& s : sequences) {
    forward(*gpu_, {{&s, 0, 65}});
    parts.push_back({&s, 65, 66});
  }
  for (int round = 0; round < 6; ++round) {
    const std::vector<float> logits = forward(*gpu_, parts).logits;
    std::vector<Draw> draws(parts.size());
    for (Draw& d : draws) d = random_draw(random);
    const std::vector<std::int32_t> drawn = forward(*gpu_, parts, false, false, draws).greedy;
    cpu::DrawScratch scratch;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const std::span row(logits.data() + i * kVocab, kVocab);
      EXPECT_EQ(drawn[i], cpu::draw_token(row, *std::ranges::max_element(row), draws[i], scratch)) << i;
    }
  }
}

// Two sequences, one greedy and one drawn, step after step with what came back, and with every step launched
// before the one in front of it was collected: the same kernels on the same numbers.
TEST_P(CudaEngine, StepsLaunchedAheadChooseTheSameTokens) {
  constexpr int kSteps = 20;
  const Sequence other{random_tokens(60, 77), {20, 21}};
  const auto run = [&](bool ahead, bool masked) {
    std::mt19937 random(21);
    const auto choose = [&] {
      if (masked) gpu_->choose(Rules(2, random).rules);
    };
    forward(*gpu_, {{&long_, 0, 40}});
    forward(*gpu_, {{&other, 0, 50}});
    std::vector<std::int32_t> last = {3, 5}, out;
    for (int i = 0; i <= kSteps; ++i) {
      if (i < kSteps) {
        const std::vector<std::int32_t> before = {-1, -2};
        const std::int32_t starts[] = {0, 1, 2}, lengths[] = {41 + i, 51 + i};
        const std::int32_t pages[] = {long_.pages[0], long_.pages[1], other.pages[0], other.pages[1]};
        const std::int32_t drawn[] = {0}, greedy[] = {1};
        const Draw draws[] = {cpu::make_draw(0.03 + 0.045 * i, 1.5, i % 3 == 0 ? 7 : 0, 0.9, 0)};
        ForwardBatch batch;
        batch.token_ids = ahead && i > 0 ? before : last;
        batch.query_starts = starts;
        batch.seq_lens = lengths;
        batch.block_table = pages;
        batch.max_blocks = 2;
        batch.drawn_rows = drawn;
        batch.draws = draws;
        batch.greedy_rows = greedy;
        batch.masked = masked;
        gpu_->launch(batch);
        if (!ahead || i == 0) choose();
      }
      if (ahead ? i == 0 : i == kSteps) continue;
      gpu_->collect(nullptr, last.data());
      out.insert(out.end(), last.begin(), last.end());
      // Where a rule leaves no token, the next step takes any.
      for (std::int32_t& token : last) token = std::max(token, 0);
      if (ahead && i < kSteps) choose();
    }
    return out;
  };
  for (const bool masked : {false, true}) {
    const std::vector<std::int32_t> expected = run(false, masked);
    EXPECT_EQ(expected.size(), 2u * kSteps);
    EXPECT_EQ(run(true, masked), expected) << masked;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, CudaEngine, testing::ValuesIn(cases()),
                         [](const auto& c) { return c.param.name; });

// The model of this repository writes the same on both devices, as far as bfloat16's rounding leaves it:
// every prompt's continuation begins alike.
TEST(CudaGeneration, TheSmallModelWritesWhatItWritesOnTheCpu) {
  const char* directory = std::getenv("FLASH_MLA_SMALL_MODEL");
  ASSERT_NE(directory, nullptr) << "set FLASH_MLA_SMALL_MODEL to the folder models/small";
  const std::vector<std::string> prompts = {"The", "Once upon a time", "It was a dark night and",
                                            "\"Why,\" said"};
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = 48;
  std::map<EngineOptions::Device, std::vector<Completion>> out;
  for (const auto device : {EngineOptions::Device::kCpu, EngineOptions::Device::kCuda}) {
    EngineOptions options;
    options.device = device;
    options.num_pages = 64;
    Engine engine(directory, options);
    out[device] = engine.generate(prompts, params);
  }
  int same = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto& cpu = out[EngineOptions::Device::kCpu][i].choices[0].token_ids;
    const auto& gpu = out[EngineOptions::Device::kCuda][i].choices[0].token_ids;
    ASSERT_FALSE(gpu.empty()) << out[EngineOptions::Device::kCuda][i].choices[0].error;
    const auto [a, b] = std::mismatch(cpu.begin(), cpu.end(), gpu.begin(), gpu.end());
    same += static_cast<int>(a - cpu.begin());
    EXPECT_GE(a - cpu.begin(), 8) << out[EngineOptions::Device::kCpu][i].choices[0].text << "\n--- and\n"
                                  << out[EngineOptions::Device::kCuda][i].choices[0].text;
  }
  EXPECT_GE(same, 96) << "of 192 tokens";
}

TEST(CudaGeneration, BatchInvariantTextDoesNotDependOnTheBatch) {
  const char* directory = std::getenv("FLASH_MLA_SMALL_MODEL");
  ASSERT_NE(directory, nullptr) << "set FLASH_MLA_SMALL_MODEL to the folder models/small";
  EngineOptions options;
  options.device = EngineOptions::Device::kCuda;
  options.num_pages = 256;
  options.batch_invariant = true;
  options.prefix_cache = false;
  Engine engine(directory, options);
  std::vector<std::string> prompts;
  for (int i = 0; i < 20; ++i) prompts.push_back("Chapter " + std::to_string(i) + ". There was");
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = 40;
  const std::vector<Completion> together = engine.generate(prompts, params);
  for (std::size_t i = 0; i < prompts.size(); i += 4) {
    const std::vector<Completion> alone = engine.generate(std::vector<std::string>{prompts[i]}, params);
    EXPECT_EQ(alone[0].choices[0].token_ids, together[i].choices[0].token_ids) << prompts[i];
  }
}

TEST(CudaGeneration, OverlappedStepsChangeNothing) {
  const char* directory = std::getenv("FLASH_MLA_SMALL_MODEL");
  ASSERT_NE(directory, nullptr) << "set FLASH_MLA_SMALL_MODEL to the folder models/small";
  std::vector<Request> requests(24);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt = "Chapter " + std::to_string(i) + ". It was";
    SamplingParams& p = requests[i].sampling;
    p.max_tokens = 10 + static_cast<int>(7 * i % 50);
    p.temperature = i % 3 == 0 ? 0 : 0.8;
    p.seed = i;
    p.top_p = i % 2 == 0 ? 0.9 : 1;
    p.top_k = i % 4 == 1 ? 20 : 0;
    p.stop = {i % 5 == 0 ? " the" : "\n\n"};
    p.n = i % 7 == 2 ? 3 : 1;
  }
  std::vector<std::vector<Completion>> out;
  for (const bool overlap : {true, false}) {
    EngineOptions options;
    options.device = EngineOptions::Device::kCuda;
    options.num_pages = 60;
    options.max_batch_size = 16;
    options.batch_invariant = true;  // so that who runs beside whom does not matter
    options.overlap_steps = overlap;
    Engine engine(directory, options);
    out.push_back(engine.generate(requests));
    EXPECT_EQ(engine.stats().pages_used, 0);
  }
  for (std::size_t i = 0; i < requests.size(); ++i) {
    for (std::size_t c = 0; c < out[0][i].choices.size(); ++c) {
      EXPECT_EQ(out[0][i].choices[c].error, "");
      EXPECT_EQ(out[0][i].choices[c].token_ids, out[1][i].choices[c].token_ids) << i;
      EXPECT_EQ(out[0][i].choices[c].text, out[1][i].choices[c].text) << i;
      EXPECT_EQ(out[0][i].choices[c].finish, out[1][i].choices[c].finish) << i;
    }
  }
}

// Formats, biases and excluded tokens: chosen on the GPU with steps ahead and without, and by the host, which
// log-probabilities make choose.
TEST(CudaGeneration, FormatsAndRulesMeetTheDraws) {
  const char* directory = std::getenv("FLASH_MLA_SMALL_MODEL");
  ASSERT_NE(directory, nullptr) << "set FLASH_MLA_SMALL_MODEL to the folder models/small";
  std::vector<Request> requests(20);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt = "Chapter " + std::to_string(i) + ". It was";
    SamplingParams& p = requests[i].sampling;
    p.max_tokens = 10 + static_cast<int>(7 * i % 50);
    p.temperature = i % 3 == 0 ? 0 : 0.8;
    p.seed = i;
    p.top_p = i % 2 == 0 ? 0.9 : 1;
    if (i % 4 == 0) {
      p.format.kind = TextFormat::Kind::kRegex;
      p.format.source = "( [a-z]{2,8}){3,12}\\.";
    }
    if (i % 4 == 1) p.format.kind = TextFormat::Kind::kJsonObject;
    if (i % 4 == 2) p.logit_bias = {{static_cast<std::int32_t>(100 + i), 4}, {7, -3}, {7, 1.5}};
    if (i % 4 == 3) p.bad_words = {"and", "of", "the"};
    if (i % 5 == 0) p.min_tokens = p.max_tokens / 2;
    if (i == 19) p.allowed_token_ids = {5, 6, 7, 300, 301};
    if (i == 18) p.n = 3;
  }
  std::vector<std::vector<Completion>> out;
  for (const auto& [overlap, logprobs] : {std::pair(true, -1), std::pair(false, -1), std::pair(true, 0)}) {
    EngineOptions options;
    options.device = EngineOptions::Device::kCuda;
    options.num_pages = 60;
    options.max_batch_size = 16;
    options.batch_invariant = true;  // so that who runs beside whom does not matter
    options.overlap_steps = overlap;
    for (Request& r : requests) r.sampling.logprobs = logprobs;
    Engine engine(directory, options);
    out.push_back(engine.generate(requests));
    EXPECT_EQ(engine.stats().pages_used, 0);
  }
  for (const std::vector<Completion>& other : {out[1], out[2]}) {
    for (std::size_t i = 0; i < requests.size(); ++i) {
      for (std::size_t c = 0; c < out[0][i].choices.size(); ++c) {
        EXPECT_EQ(out[0][i].choices[c].error, "");
        EXPECT_EQ(out[0][i].choices[c].token_ids, other[i].choices[c].token_ids) << i;
        EXPECT_EQ(out[0][i].choices[c].text, other[i].choices[c].text) << i;
        EXPECT_EQ(out[0][i].choices[c].finish, other[i].choices[c].finish) << i;
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::model
