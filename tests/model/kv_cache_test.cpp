// Models whose cache has a format of its own (ModelOptions::kv_cache): dense and sparse attention over it, in every
// way of cutting the work.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>

#include "checkpoint/config.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "model/model.h"
#include "model/size.h"
#include "sanitized.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using testing::HasSubstr;

constexpr int kVocab = 40;
constexpr const char* kDense = R"({
  "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 3, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 16, "qk_rope_head_dim": 64,
  "v_head_dim": 16, "n_routed_experts": null, "max_position_embeddings": 512})";
constexpr const char* kSparse = R"({
  "model_type": "deepseek_v32", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 3, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 16, "qk_rope_head_dim": 64,
  "v_head_dim": 16, "n_routed_experts": null, "max_position_embeddings": 512,
  "index_topk": 48, "index_n_heads": 8, "index_head_dim": 128})";

ModelOptions options(ModelKvCache kv_cache, ModelPrecision precision = ModelPrecision::kFloat32) {
  ModelOptions out;
  out.device = ModelDevice::kCpu;
  out.precision = precision;
  out.kv_cache = kv_cache;
  out.num_threads = 2;
  return out;
}

std::unique_ptr<Model> make(const char* config, const ModelOptions& options) {
  auto model = make_random_model(checkpoint::parse_config(config, "test"), options);
  model->allocate_cache(8);
  return model;
}

/// Logits of the `count` last of the first `length` tokens of the sequence in `pages`.
std::vector<float> step(Model& model, std::int32_t length, std::int32_t count,
                        const std::vector<std::int32_t>& pages, bool batch_invariant = false) {
  std::vector<std::int32_t> ids, rows;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t t = length - count + i;
    ids.push_back((t * t + 3 * t) % kVocab);
    rows.push_back(i);
  }
  const std::int32_t starts[] = {0, count}, lengths[] = {length};
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lengths;
  batch.block_table = pages;
  batch.max_blocks = static_cast<int>(pages.size());
  batch.logit_rows = rows;
  batch.batch_invariant = batch_invariant;
  std::vector<float> logits(rows.size() * kVocab);
  model.forward(batch, logits.data(), nullptr);
  return logits;
}

double deviation(const std::vector<float>& x) {
  double sum = 0, squares = 0;
  for (const float v : x) sum += double{v};
  for (const float v : x) squares += std::pow(double{v} - sum / static_cast<double>(x.size()), 2);
  return std::sqrt(squares / static_cast<double>(x.size()));
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double squares = 0;
  for (std::size_t i = 0; i < a.size(); ++i) squares += std::pow(double{a[i]} - double{b[i]}, 2);
  return std::sqrt(squares / static_cast<double>(a.size()));
}

struct Case {
  const char* name;
  const char* config;
  ModelKvCache kv_cache;
  double least, most;  // root mean square difference of logits over their deviation
};

class KvCache : public testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(Formats, KvCache,
                         testing::Values(Case{"DenseBFloat16", kDense, ModelKvCache::kBFloat16, 1e-6, 5e-3},
                                         Case{"DenseFloat16", kDense, ModelKvCache::kFloat16, 1e-7, 6e-4},
                                         Case{"DenseFp8", kDense, ModelKvCache::kFp8, 1e-5, 5e-2},
                                         Case{"SparseBFloat16", kSparse, ModelKvCache::kBFloat16, 1e-6, 1e-1},
                                         Case{"SparseFp8", kSparse, ModelKvCache::kFp8, 1e-5, 3e-1}),
                         [](const auto& c) { return std::string(c.param.name); });

TEST_P(KvCache, ChangesLittle) {
  const auto exact = make(GetParam().config, options(ModelKvCache::kAuto));
  const auto rounded = make(GetParam().config, options(GetParam().kv_cache));
  const std::vector<float> a = step(*exact, 200, 200, {1, 0, 3, 2}),
                           b = step(*rounded, 200, 200, {1, 0, 3, 2});
  const double relative = difference(a, b) / deviation(a);
  EXPECT_GT(relative, GetParam().least);
  EXPECT_LT(relative, GetParam().most);
}

TEST_P(KvCache, ChunksAndStepsAgreeWithTheWhole) {
  const auto model = make(GetParam().config, options(GetParam().kv_cache));
  const std::vector<float> whole = step(*model, 150, 150, {0, 1, 2});
  std::vector<float> parts;
  std::int32_t length = 0;
  for (const std::int32_t count : {70, 17, 16, 40, 1, 1, 5}) {
    length += count;
    const std::vector<float> more = step(*model, length, count, {5, 3, 4});
    parts.insert(parts.end(), more.begin(), more.end());
  }
  EXPECT_EQ(length, 150);
  // What is rounded to the cache may round the other way, and so may a choice.
  EXPECT_LT(difference(whole, parts) / deviation(whole), GetParam().most / 2);
}

TEST_P(KvCache, BatchInvariantStepsDoNotDependOnTheChunks) {
  const auto model = make(GetParam().config, options(GetParam().kv_cache));
  const std::vector<float> whole = step(*model, 130, 130, {0, 1, 2}, true);
  step(*model, 70, 70, {5, 3, 4}, true);
  const std::vector<float> rest = step(*model, 130, 60, {5, 3, 4}, true);
  EXPECT_TRUE(std::equal(rest.begin(), rest.end(), whole.end() - std::ssize(rest)));
}

TEST_P(KvCache, ACopiedPageContinuesTheSequence) {
  const auto model = make(GetParam().config, options(GetParam().kv_cache));
  step(*model, 100, 100, {2, 1});
  model->copy_page(2, 6);
  model->copy_page(1, 7);
  const std::vector<float> before = step(*model, 101, 1, {2, 1});
  EXPECT_EQ(step(*model, 101, 1, {6, 7}), before);
  // The copies are their own: another sequence in the pages that they were made of.
  step(*model, 33, 33, {2, 1});
  EXPECT_EQ(step(*model, 101, 1, {6, 7}), before);
}

// A prompt of 20,000 tokens, of which a token attends to 64, in chunks of two sizes and with one token at the end.
TEST(LongPrompt, IsTheSameInAnyChunks) {
  constexpr const char* kLong = R"({
    "model_type": "deepseek_v32", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": null,
    "max_position_embeddings": 32768, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16})";
  constexpr std::int32_t kLength = unless_sanitized(20000, 5000);
  const auto model = make_random_model(checkpoint::parse_config(kLong, "test"), options(ModelKvCache::kAuto));
  model->allocate_cache(kLength / 64 + 1);
  std::vector<std::int32_t> pages;
  for (std::int32_t i = 0; i <= kLength / 64; ++i) pages.push_back(kLength / 64 - i);
  const auto last = [&](std::int32_t chunk) {
    for (std::int32_t at = 0; at < kLength - 1; at += chunk) {
      step(*model, std::min(at + chunk, kLength - 1), std::min(chunk, kLength - 1 - at), pages);
    }
    return step(*model, kLength, 1, pages);
  };
  const std::vector<float> a = last(2048), b = last(3000);
  EXPECT_TRUE(std::ranges::all_of(a, [](float x) { return std::isfinite(x); }));
  EXPECT_LT(difference(a, b) / deviation(a), 0.02);
}

TEST(KvCacheOption, ReadsPagesOfAnyFormatInBFloat16) {
  if (!cpu_isa().selected.starts_with("avx512")) GTEST_SKIP() << "bfloat16 needs AVX-512";
  for (const char* config : {kDense, kSparse}) {
    const auto exact = make(config, options(ModelKvCache::kBFloat16, ModelPrecision::kBFloat16));
    const auto rounded = make(config, options(ModelKvCache::kFp8, ModelPrecision::kBFloat16));
    const std::vector<float> a = step(*exact, 200, 200, {1, 0, 3, 2}),
                             b = step(*rounded, 200, 200, {1, 0, 3, 2});
    EXPECT_GT(difference(a, b), 0);
    EXPECT_LT(difference(a, b) / deviation(a), 0.3);
  }
}

TEST(KvCacheOption, CountsItsBytes) {
  const auto bytes = [](const char* config, ModelKvCache kv_cache) {
    const auto model = make(config, options(kv_cache));
    return static_cast<double>(model->bytes_per_page());
  };
  EXPECT_EQ(bytes(kDense, ModelKvCache::kAuto), 2 * 64 * 576 * 4);
  EXPECT_EQ(bytes(kDense, ModelKvCache::kBFloat16), 2 * 64 * 576 * 2);
  EXPECT_EQ(bytes(kDense, ModelKvCache::kFp8), 2 * 64 * 656);
  EXPECT_EQ(bytes(kSparse, ModelKvCache::kBFloat16), 2 * 64 * (576 * 2 + 128 * 4));
  EXPECT_EQ(bytes(kSparse, ModelKvCache::kFp8), 2 * 64 * (656 + 132));
}

TEST(KvCacheOption, RefusesByName) {
  const auto message = [](const std::string& from, const std::string& to, const ModelOptions& options) {
    std::string config = kSparse;
    config.replace(config.find(from), from.size(), to);
    return message_of<Unsupported>([&] { make(config.c_str(), options); });
  };
  const ModelOptions fp8 = options(ModelKvCache::kFp8);
  EXPECT_THAT(message("\"kv_lora_rank\": 512", "\"kv_lora_rank\": 256", fp8),
              HasSubstr("kv_lora_rank is 256, expected 512 for a kv_cache of fp8"));
  EXPECT_THAT(
      message("\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 32", options(ModelKvCache::kBFloat16)),
      HasSubstr("qk_rope_head_dim is 32, expected 64"));
  EXPECT_THAT(message("\"index_head_dim\": 128", "\"index_head_dim\": 96", fp8),
              HasSubstr("index_head_dim is 96, expected 64 or 128"));
  EXPECT_THAT(message("512", "512", options(ModelKvCache::kFloat16, ModelPrecision::kBFloat16)),
              HasSubstr("kv_cache is float16"));
  ModelOptions cuda = fp8;
  cuda.device = ModelDevice::kCuda;
  EXPECT_THAT(message_of<Unsupported>([&] { make(kDense, cuda); }), HasSubstr("kv_cache"));
}

}  // namespace
}  // namespace flash_mla::model
