// Weights in the form of a GPU's products in e4m3, of checkpoints and quantised.

#include "model/e4m3_weight.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/quant/cpu/weights.h"
#include "random_checkpoint.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

constexpr const char* kConfig =
    R"({"model_type": "deepseek_v3", "vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256,
        "hidden_size": 208, "intermediate_size": 144, "num_attention_heads": 2, "kv_lora_rank": 64, "q_lora_rank": 144,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "n_shared_experts": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": true, "routed_scaling_factor": 1.0,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})";

/// What codes and scales mean, in bfloat16.
std::vector<std::uint16_t> widened(const E4m3Weight& w) {
  const std::int64_t width = (w.columns + 127) / 128;
  std::vector<std::uint16_t> out(static_cast<std::size_t>(w.rows * w.columns));
  for (std::int64_t i = 0; i < w.rows * w.columns; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const std::int64_t scale = i / w.columns / 8 * width + i % w.columns / 128;
    out[at] = to_bf16(to_float(E4m3{w.codes[at]}) * w.scales[static_cast<std::size_t>(scale)]).bits;
  }
  return out;
}

std::vector<std::uint16_t> read_bf16(const Weight& weight) {
  std::vector<std::uint16_t> out(static_cast<std::size_t>(weight.size()));
  weight.read(out.data());
  return out;
}

class StoredE4m3 : public testing::TestWithParam<Stored> {
 protected:
  void SetUp() override {
    directory_.write("config.json", kConfig);
    config_ = checkpoint::read_config(directory_.path());
    directory_.write("model.safetensors", RandomCheckpoint(config_, GetParam()).bytes());
    checkpoint_ = std::make_unique<Checkpoint>(Checkpoint::open(directory_.path()));
    weights_ = checkpoint_weights(config_, *checkpoint_, DType::kBFloat16);
  }

  TemporaryDirectory directory_;
  ModelConfig config_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<WeightSource> weights_;
};

// Of every projection, those with several tensors and with rows that were put in order among them.
TEST_P(StoredE4m3, MeansWhatTheReaderOfBfloat16Gives) {
  const AttentionWeights attention = weights_->attention(0);
  const FeedForwardWeights dense = weights_->feed_forward(0);
  const MixtureWeights mixture = weights_->mixture(1);
  const ExpertWeights expert = mixture.expert(3);
  for (const Weight* weight :
       {&attention.qkv_a, &attention.q_b, &attention.o, &dense.gate_up, &dense.down, &expert.gate_up,
        &expert.down, &mixture.shared_gate_up, &mixture.shared_down}) {
    SCOPED_TRACE(weight->tensors.front());
    ASSERT_TRUE(stored_as_e4m3(*weight));
    E4m3Weight read(weight->rows, weight->columns);
    ASSERT_TRUE(read_e4m3(*weight, read.codes.get(), read.scales.data()));
    EXPECT_EQ(widened(read), read_bf16(*weight));
  }
  EXPECT_FALSE(stored_as_e4m3(weights_->embedding()));
  EXPECT_FALSE(stored_as_e4m3(weights_->head().weight));
}

// A shared expert's rows of gate and up, and its columns of down.
TEST_P(StoredE4m3, Cuts) {
  const Weight down = weights_->mixture(1).shared_down;
  E4m3Weight all(down.rows, down.columns);
  ASSERT_TRUE(read_e4m3(down, all.codes.get(), all.scales.data()));
  const std::vector<std::uint16_t> want = read_bf16(down);
  for (const E4m3Cut& cut : {E4m3Cut{0, 208, 0, 256}, E4m3Cut{0, 208, 128, 128}, E4m3Cut{136, 72, 0, 128},
                             E4m3Cut{8, 16, 128, 128}}) {
    E4m3Weight part(cut.rows, cut.columns);
    cut_e4m3(all, cut, part.codes.get(), part.scales.data());
    const std::vector<std::uint16_t> got = widened(part);
    for (std::int64_t i = 0; i < cut.rows * cut.columns; ++i) {
      const std::int64_t from = (cut.row + i / cut.columns) * down.columns + cut.column + i % cut.columns;
      ASSERT_EQ(got[static_cast<std::size_t>(i)], want[static_cast<std::size_t>(from)])
          << cut.row << " " << i;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(E4m3Weight, StoredE4m3, testing::Values(Stored::kFp8, Stored::kFp8Powers),
                         [](const auto& p) { return p.param == Stored::kFp8 ? "Scales" : "Powers"; });

Weight stored(std::int64_t rows, std::int64_t columns, std::int64_t group, std::vector<float> scales) {
  Weight out;
  out.rows = rows;
  out.columns = columns;
  out.stored = QuantizedFormat{QuantizedType::kE4m3, group};
  out.read_quantized = [=](std::uint8_t* codes, float* to) {
    std::fill_n(codes, rows * columns, std::uint8_t{0x38});
    std::copy(scales.begin(), scales.end(), to);
  };
  return out;
}

TEST(E4m3Weight, OtherBlocks) {
  // Groups of 256 columns are two of 128.
  const Weight wide = stored(8, 272, 256, {1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2});
  ASSERT_TRUE(stored_as_e4m3(wide));
  E4m3Weight read(8, 272);
  EXPECT_TRUE(read_e4m3(wide, read.codes.get(), read.scales.data()));
  EXPECT_EQ(read.scales, (std::vector<float>{1, 1, 2}));
  // Scales that differ within 8 rows.
  const Weight rows = stored(8, 16, 128, {1, 1, 1, 1, 2, 2, 2, 2});
  ASSERT_TRUE(stored_as_e4m3(rows));
  EXPECT_FALSE(read_e4m3(rows, read.codes.get(), read.scales.data()));
  EXPECT_FALSE(stored_as_e4m3(stored(8, 256, 64, {})));
  EXPECT_TRUE(stored_as_e4m3(stored(8, 48, 64, {})));
  EXPECT_FALSE(stored_as_e4m3(stored(12, 256, 128, {})));
  EXPECT_FALSE(stored_as_e4m3(stored(8, 264, 128, {})));
  Weight int4 = stored(8, 256, 128, {});
  int4.stored->type = QuantizedType::kInt4;
  EXPECT_FALSE(stored_as_e4m3(int4));
}

TEST(E4m3Weight, QuantisesAsTheCpuDoes) {
  constexpr std::int64_t kRows = 264, kColumns = 144;
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 0.05f);
  std::vector<std::uint16_t> values(kRows * kColumns);
  std::vector<float> wide;
  for (std::uint16_t& v : values) {
    v = to_bf16(normal(random) * (random() % 500 == 0 ? 100.0f : 1.0f)).bits;
    wide.push_back(to_float(Bf16{v}));
  }
  std::vector<std::uint8_t> codes(values.size());
  std::vector<float> scales(3 * 2);
  cpu::quantise_fp8_blocks(wide.data(), kRows, kColumns, false, codes.data(), scales.data());
  E4m3Weight got(kRows, kColumns);
  quantise_e4m3(values.data(), kRows, kColumns, got.codes.get(), got.scales.data());
  EXPECT_EQ(std::vector<std::uint8_t>(got.codes.get(), got.codes.get() + values.size()), codes);
  ASSERT_EQ(got.scales.size(), 33u * 2);
  for (std::size_t i = 0; i < got.scales.size(); ++i)
    EXPECT_EQ(got.scales[i], scales[i / 2 / 16 * 2 + i % 2]) << i;
}

TEST(E4m3Weight, KnowsWhetherItsScalesAreThoseOfBlocks) {
  // 36 rows of 2 scales: blocks of 16, 16 and 4; halves of 18: 16 and 2.
  constexpr std::int64_t kRows = 288, kColumns = 200;
  const auto scales = [](auto&& block_of) {
    std::vector<float> out;
    for (std::int64_t row = 0; row < kRows / 8; ++row) {
      for (std::int64_t c = 0; c < 2; ++c) out.push_back(static_cast<float>(10 * block_of(row) + c));
    }
    return out;
  };
  std::vector<float> whole = scales([](std::int64_t row) { return row / 16; });
  std::vector<float> halves = scales([](std::int64_t row) { return row / 18 * 2 + row % 18 / 16; });
  EXPECT_TRUE(in_whole_blocks(whole.data(), kRows, kColumns));
  EXPECT_FALSE(in_halves_of_blocks(whole.data(), kRows, kColumns));
  EXPECT_FALSE(in_whole_blocks(halves.data(), kRows, kColumns));
  EXPECT_TRUE(in_halves_of_blocks(halves.data(), kRows, kColumns));
  whole.back() += 1;
  halves.back() += 1;
  EXPECT_FALSE(in_whole_blocks(whole.data(), kRows, kColumns));
  EXPECT_FALSE(in_halves_of_blocks(halves.data(), kRows, kColumns));
  EXPECT_FALSE(in_halves_of_blocks(halves.data(), 264, kColumns));  // halves that are no whole rows of scales
}

TEST(E4m3Weight, WhatIsAskedFor) {
  EXPECT_TRUE(asks_for_e4m3(ModelQuantize::kFp8, LayerKind::kExperts));
  EXPECT_TRUE(asks_for_e4m3(ModelQuantize::kFp8, LayerKind::kAttention));
  EXPECT_FALSE(asks_for_e4m3(ModelQuantize::kFp8, LayerKind::kDense));
  EXPECT_FALSE(asks_for_e4m3(ModelQuantize::kFp8, LayerKind::kHead));
  EXPECT_FALSE(asks_for_e4m3(ModelQuantize::kW4A8, LayerKind::kExperts));
  EXPECT_FALSE(asks_for_e4m3(ModelQuantize::kNone, LayerKind::kExperts));
}

}  // namespace
}  // namespace flash_mla::model
