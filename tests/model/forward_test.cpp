// The forward pass on a tiny random checkpoint: small enough for the sanitizers. Whether the numbers are
// right is for tests/python/test_model.py to say; here every way of cutting the work must agree.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "checkpoint/config.h"
#include "flash_mla/error.h"
#include "kernels/sampling/cpu/draw.h"
#include "model/model.h"
#include "safetensors_file.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using testing::HasSubstr;

constexpr int kVocab = 30;
constexpr const char* kConfig = R"({
  "model_type": "deepseek_v3", "vocab_size": 30, "hidden_size": 24, "intermediate_size": 20,
  "moe_intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "q_lora_rank": 10,
  "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4,
  "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
  "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "max_position_embeddings": 256,
  "rope_theta": 10000.0})";

class Weights {
 public:
  Weights& random(const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t size = 1;
    for (const std::int64_t n : shape) size *= n;
    std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(shape.back())));
    std::vector<float> values(static_cast<std::size_t>(size));
    for (float& v : values) v = normal(random_);
    file_.add(name, "F32", std::move(shape), values);
    return *this;
  }
  Weights& ones(const std::string& name, std::int64_t size) {
    file_.add(name, "F32", {size}, std::vector<float>(static_cast<std::size_t>(size), 1.0f));
    return *this;
  }
  void feed_forward(const std::string& name, std::int64_t width) {
    random(name + ".gate_proj.weight", {width, 24}).random(name + ".up_proj.weight", {width, 24});
    random(name + ".down_proj.weight", {24, width});
  }
  std::string bytes() const { return file_.bytes(); }

 private:
  SafetensorsFile file_;
  std::mt19937 random_{1};
};

std::string weights() {
  Weights w;
  w.random("model.embed_tokens.weight", {kVocab, 24}).random("lm_head.weight", {kVocab, 24});
  w.ones("model.norm.weight", 24);
  for (const std::string layer : {"model.layers.0", "model.layers.1"}) {
    const std::string a = layer + ".self_attn";
    w.ones(layer + ".input_layernorm.weight", 24).ones(layer + ".post_attention_layernorm.weight", 24);
    w.random(a + ".q_a_proj.weight", {10, 24}).ones(a + ".q_a_layernorm.weight", 10);
    w.random(a + ".q_b_proj.weight", {30, 10}).random(a + ".kv_a_proj_with_mqa.weight", {20, 24});
    w.ones(a + ".kv_a_layernorm.weight", 16).random(a + ".kv_b_proj.weight", {33, 16});
    w.random(a + ".o_proj.weight", {24, 15});
  }
  w.feed_forward("model.layers.0.mlp", 20);
  w.random("model.layers.1.mlp.gate.weight", {4, 24});
  w.random("model.layers.1.mlp.gate.e_score_correction_bias", {4});
  for (int e = 0; e < 4; ++e) w.feed_forward("model.layers.1.mlp.experts." + std::to_string(e), 12);
  w.feed_forward("model.layers.1.mlp.shared_experts", 12);
  return w.bytes();
}

std::vector<std::int32_t> tokens(std::int32_t count) {
  std::vector<std::int32_t> out;
  for (std::int32_t i = 0; i < count; ++i) out.push_back(i * 7 % kVocab);
  return out;
}

class Forward : public testing::Test {
 protected:
  Forward() {
    directory_.write("config.json", kConfig);
    directory_.write("model.safetensors", weights());
    model_ = load();
    model_->allocate_cache(8);
  }

  static ModelOptions model_options() {
    ModelOptions options;
    options.device = ModelDevice::kCpu;
    options.precision = ModelPrecision::kFloat32;
    options.num_threads = 2;
    return options;
  }

  std::unique_ptr<Model> load() const { return load_model(directory_.path(), model_options()); }

  /// Logits of the `new_tokens` last of one sequence's first `length` tokens, with its pages.
  std::vector<float> step(std::int32_t length, std::int32_t new_tokens, std::vector<std::int32_t> pages,
                          bool batch_invariant = false) {
    const std::vector<std::int32_t> all = tokens(length);
    const std::vector<std::int32_t> ids(all.end() - new_tokens, all.end());
    const std::int32_t starts[] = {0, new_tokens}, lengths[] = {length};
    std::vector<std::int32_t> rows(static_cast<std::size_t>(new_tokens));
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::int32_t>(i);
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = pages;
    batch.max_blocks = static_cast<int>(pages.size());
    batch.logit_rows = rows;
    batch.batch_invariant = batch_invariant;
    std::vector<float> logits(rows.size() * kVocab);
    model_->forward(batch, logits.data(), nullptr);
    return logits;
  }

  TemporaryDirectory directory_;
  std::unique_ptr<Model> model_;
};

void expect_close(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-4) << "at " << i;
}

TEST_F(Forward, ChunksAndStepsAgreeWithTheWhole) {
  const std::vector<float> whole = step(150, 150, {0, 1, 2});
  std::vector<float> parts = step(70, 70, {5, 3, 4});
  const auto add = [&](std::int32_t length, std::int32_t count) {
    const std::vector<float> more = step(length, count, {5, 3, 4});
    parts.insert(parts.end(), more.begin(), more.end());
  };
  add(87, 17);
  add(103, 16);
  for (std::int32_t length = 104; length <= 150; ++length) add(length, 1);
  expect_close(whole, parts);
}

TEST_F(Forward, BatchInvariantStepsAgreeToo) {
  expect_close(step(130, 130, {0, 1, 2}), step(130, 130, {3, 4, 5}, true));
}

TEST_F(Forward, ACopiedPageContinuesTheSequence) {
  step(50, 50, {2});
  model_->copy_page(2, 6);
  EXPECT_EQ(step(51, 1, {2}), step(51, 1, {6}));
}

// Greedy and drawn tokens of two sequences: step after step with what came back, and with every step launched
// before the one in front of it has been collected.
TEST_F(Forward, StepsLaunchedAheadChooseTheSameTokens) {
  constexpr int kSteps = 12;
  const auto run = [&](bool ahead) {
    step(20, 20, {0});
    step(30, 30, {1});
    std::vector<std::int32_t> last = {3, 5}, out;
    for (std::int32_t i = 0; i < kSteps + 1; ++i) {
      if (i < kSteps) {
        // Of the tokens that the step before chose, the drawn one (of sequence 0) comes first.
        const std::vector<std::int32_t> before = {-1, -2};
        const std::int32_t starts[] = {0, 1, 2}, lengths[] = {21 + i, 31 + i}, pages[] = {0, 1};
        const std::int32_t drawn[] = {0}, greedy[] = {1};
        const Draw draws[] = {cpu::make_draw(0.05 + 0.07 * i, 2.0, i % 2 == 0 ? 5 : 0, 0.9, 0)};
        ForwardBatch batch;
        batch.token_ids = ahead && i > 0 ? before : last;
        batch.query_starts = starts;
        batch.seq_lens = lengths;
        batch.block_table = pages;
        batch.max_blocks = 1;
        batch.drawn_rows = drawn;
        batch.draws = draws;
        batch.greedy_rows = greedy;
        model_->launch(batch);
      }
      if (ahead && i == 0) continue;
      if (!ahead && i == kSteps) break;
      model_->collect(nullptr, last.data());
      out.insert(out.end(), last.begin(), last.end());
    }
    return out;
  };
  const std::vector<std::int32_t> expected = run(false);
  EXPECT_EQ(expected.size(), 2u * kSteps);
  EXPECT_GT(std::set<std::int32_t>(expected.begin(), expected.end()).size(), 3u);
  EXPECT_EQ(run(true), expected);
}

// Greedy and drawn tokens among those that a mask leaves, beside what the host makes of the same logits.
TEST_F(Forward, ChoosesAmongTheTokensOfAMask) {
  const auto vocab_size = static_cast<std::size_t>(model_->vocab_size());
  const std::size_t words = (vocab_size + 31) / 32;
  step(20, 20, {0});
  const std::int32_t ids[] = {7}, starts[] = {0, 1}, lengths[] = {21}, pages[] = {0}, row[] = {0};
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = pages;
  batch.max_blocks = 1;
  batch.logit_rows = row;
  std::vector<float> plain(vocab_size);
  model_->forward(batch, plain.data(), nullptr);
  batch.logit_rows = {};
  batch.drawn_rows = row;
  batch.greedy_rows = row;
  batch.masked = true;
  Draw draws[1];
  batch.draws = draws;
  ASSERT_TRUE(model_->draws_take_masks());
  cpu::DrawScratch scratch;
  for (std::uint32_t i = 0; i < 12; ++i) {
    std::vector<std::uint32_t> mask(words);
    for (std::uint32_t& word : mask)
      word = (0x9e3779b9U * (i + 1)) ^ static_cast<std::uint32_t>(&word - mask.data());
    if (i == 11) std::ranges::fill(mask, 0U);
    draws[0] = cpu::make_draw(0.08 * i, 3.0, i % 2 == 0 ? 5 : 0, 0.9, 0);
    model_->launch(batch);
    const std::vector<TokenBias> biases = {{3, -2}, {5, 1.5F}, {5, -0.25F}, {100000, 9}};
    const TokenRule drawn_rule{mask.data(), biases}, free;
    const TokenRule rules[] = {drawn_rule, i % 3 == 0 ? free : TokenRule{mask.data(), {}}};
    model_->choose(rules);
    std::int32_t tokens[2];
    model_->collect(nullptr, tokens);
    std::vector<float> masked = plain, greedy = plain;
    cpu::apply_rule(masked, drawn_rule);
    cpu::apply_rule(greedy, rules[1]);
    const auto best = std::ranges::max_element(masked);
    const auto likeliest = static_cast<std::int32_t>(std::ranges::max_element(greedy) - greedy.begin());
    if (i == 11) {
      EXPECT_EQ(tokens[0], -1) << "nothing is left";
      EXPECT_EQ(tokens[1], -1);
      continue;
    }
    EXPECT_EQ(tokens[0], cpu::draw_token(masked, *best, draws[0], scratch)) << i;
    EXPECT_EQ(tokens[1], likeliest) << i;
  }
  model_->launch(batch);
  EXPECT_THROW(model_->choose({}), InvalidArgument);
  EXPECT_THROW(model_->collect(nullptr, nullptr), std::logic_error);  // not chosen
  EXPECT_THROW(model_->choose({}), std::logic_error);                 // nothing is on its way
}

TEST_F(Forward, RefusesWhatIsOutOfRange) {
  const std::int32_t ids[] = {-1}, starts[] = {0, 1}, lengths[] = {1}, pages[] = {0};
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = pages;
  batch.max_blocks = 1;
  EXPECT_THAT(message_of<InvalidArgument>([&] { model_->launch(batch); }), HasSubstr("token_ids[0] is -1"));

  EXPECT_THAT(message_of<InvalidArgument>([&] { step(10, 10, {8}); }), HasSubstr("block_table[0][0] is 8"));
  EXPECT_THAT(message_of<InvalidArgument>([&] {
                step(257, 1, {0, 1, 2, 3, 4});
              }),
              HasSubstr("seq_lens[0] is 257"));
  EXPECT_THAT(message_of<InvalidArgument>([&] { model_->copy_page(-1, 0); }), HasSubstr("source is -1"));
  EXPECT_THAT(message_of<InvalidArgument>([&] { model_->allocate_cache(-1); }), HasSubstr("num_pages is -1"));
}

TEST_F(Forward, NamesTheTensorThatHoldsNan) {
  std::string bytes = weights();
  const float nan = std::nanf("");
  std::memcpy(bytes.data() + bytes.size() - sizeof nan, &nan, sizeof nan);
  directory_.write("model.safetensors", bytes);
  EXPECT_THAT(message_of<InvalidArgument>([&] { load(); }),
              HasSubstr("model.layers.1.mlp.shared_experts.down_proj.weight holds nan at row 23, column 11"));
}

TEST_F(Forward, RandomWeightsAreTheSameEveryTimeAndFiniteAndDependOnTheTokens) {
  const std::vector<float> loaded = step(20, 20, {0});
  const auto make = [&](const ModelOptions& options) {
    model_ = make_random_model(checkpoint::parse_config(kConfig, "test"), options);
    model_->allocate_cache(8);
  };
  make(model_options());
  const std::vector<float> first = step(20, 20, {0});
  EXPECT_TRUE(std::ranges::all_of(first, [](float x) { return std::isfinite(x); }));
  EXPECT_NE(first, loaded);
  EXPECT_GT(std::set(first.begin(), first.end()).size(), first.size() / 2);
  expect_close(first, [&] {
    std::vector<float> parts = step(17, 17, {1});
    const std::vector<float> rest = step(20, 3, {1});
    parts.insert(parts.end(), rest.begin(), rest.end());
    return parts;
  }());
  make(model_options());
  EXPECT_EQ(step(20, 20, {0}), first);
  ModelOptions int8 = model_options();
  int8.quantize = ModelQuantize::kInt8;
  make(int8);
  EXPECT_TRUE(std::ranges::all_of(step(20, 20, {0}), [](float x) { return std::isfinite(x); }));
}

TEST_F(Forward, CountsItsCacheBytes) {
  EXPECT_EQ(model_->bytes_per_page(), std::size_t{2 * 64 * (16 + 4) * 4});
  EXPECT_EQ(model_->vocab_size(), kVocab);
  EXPECT_EQ(model_->max_position(), 256);
}

}  // namespace
}  // namespace flash_mla::model
