// Tokens of one sequence that a step takes together attend together. In a batch-invariant step each of them has the bits
// that it has alone.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "flash_mla/info.h"
#include "model/model.h"

namespace flash_mla::model {
namespace {

using Ids = std::vector<std::int32_t>;

constexpr int kVocab = 40;
// Long enough for several of the splits that a batch-invariant step makes, at 1,024 keys each.
constexpr std::int32_t kLength = 1100;

struct Kind {
  int heads = 4;
  ModelPrecision precision = ModelPrecision::kFloat32;
  ModelKvCache kv_cache = ModelKvCache::kAuto;
};

std::string config(const Kind& kind) {
  const bool fp8 = kind.kv_cache == ModelKvCache::kFp8;  // whose rows have one size
  return R"({"model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32,
             "num_hidden_layers": 2, "q_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8,
             "n_routed_experts": null, "max_position_embeddings": 2048, "num_attention_heads": )" +
         std::to_string(kind.heads) + R"(, "kv_lora_rank": )" + std::to_string(fp8 ? 512 : 32) +
         R"(, "qk_rope_head_dim": )" + std::to_string(fp8 ? 64 : 8) + "}";
}

// Some sequences of the same model, in pages of their own.
class Sequences {
 public:
  Sequences(const Kind& kind, int count) {
    ModelOptions options;
    options.device = ModelDevice::kCpu;
    options.precision = kind.precision;
    options.kv_cache = kind.kv_cache;
    options.num_threads = 1;
    model_ = make_random_model(checkpoint::parse_config(config(kind), "test"), options);
    model_->allocate_cache(count * kPages);
    lengths_.assign(static_cast<std::size_t>(count), 0);
  }

  /// Logits of counts[s] more tokens of every sequence, which are others in each.
  std::vector<std::vector<float>> step(const std::vector<int>& counts) {
    Ids ids, starts{0}, lengths, table, rows;
    for (std::size_t s = 0; s < counts.size(); ++s) {
      for (int i = 0; i < counts[s]; ++i) {
        const std::int32_t t = lengths_[s]++ + static_cast<std::int32_t>(7 * s);
        rows.push_back(static_cast<std::int32_t>(ids.size()));
        ids.push_back((t * t + 3 * t) % kVocab);
      }
      starts.push_back(static_cast<std::int32_t>(ids.size()));
      lengths.push_back(lengths_[s]);
      for (int p = 0; p < kPages; ++p) table.push_back(static_cast<std::int32_t>(s) * kPages + p);
    }
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.query_starts = starts;
    batch.seq_lens = lengths;
    batch.block_table = table;
    batch.max_blocks = kPages;
    batch.logit_rows = rows;
    batch.batch_invariant = true;
    std::vector<float> logits(rows.size() * kVocab);
    model_->forward(batch, logits.data(), nullptr);
    std::vector<std::vector<float>> out;
    for (std::size_t s = 0; s < counts.size(); ++s) {
      out.emplace_back(logits.begin() + std::ptrdiff_t{starts[s]} * kVocab,
                       logits.begin() + std::ptrdiff_t{starts[s + 1]} * kVocab);
    }
    return out;
  }

 private:
  static constexpr int kPages = (kLength + kPageSize - 1) / kPageSize;
  std::unique_ptr<Model> model_;
  Ids lengths_;
};

void expect_bits_of_single_tokens(const Kind& kind) {
  SCOPED_TRACE(kind.heads);
  constexpr int kPrompt = 1000, kCompared = 60;
  Sequences alone(kind, 1), together(kind, 3);
  alone.step({kPrompt});
  std::vector<float> expected;
  for (int i = 0; i < kCompared; ++i) {
    const std::vector<float> more = alone.step({1})[0];
    expected.insert(expected.end(), more.begin(), more.end());
  }
  together.step({kPrompt, 70, 3});
  std::vector<float> got;
  int left = kCompared;
  for (const int count : {4, 1, 9, 16, 2, 28}) {  // the fourth goes over the cut at 1,024 keys
    const std::vector<float> more = together.step({count, 4, 1})[0];
    got.insert(got.end(), more.begin(), more.end());
    left -= count;
  }
  EXPECT_EQ(left, 0);
  EXPECT_TRUE(got == expected);
}

TEST(Runs, HaveTheBitsOfSingleTokens) {
  for (const int heads : {1, 4, 20}) {
    expect_bits_of_single_tokens({heads, ModelPrecision::kFloat32});
  }
}

TEST(Runs, HaveTheBitsOfSingleTokensInBFloat16) {
  if (!cpu_isa().selected.starts_with("avx512")) GTEST_SKIP() << "bfloat16 needs AVX-512";
  for (const int heads : {1, 4, 20}) {
    expect_bits_of_single_tokens({heads, ModelPrecision::kBFloat16});
  }
}

TEST(Runs, HaveTheBitsOfSingleTokensInACacheOfFp8) {
  expect_bits_of_single_tokens({4, ModelPrecision::kFloat32, ModelKvCache::kFp8});
}

// More kinds of runs than are taken apart: all tokens one by one.
TEST(Runs, OfManyLengthsHaveThemToo) {
  const std::vector<int> counts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  Sequences alone(Kind(), 1), together(Kind(), 12);
  const std::vector<std::vector<float>> all = together.step(counts);
  std::vector<float> expected;
  for (int i = 0; i < counts[0]; ++i) expected = alone.step({1})[0];
  EXPECT_TRUE(all[0] == expected);
}

}  // namespace
}  // namespace flash_mla::model
