// Tiers under a real model: models/small, by the public engine.

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "flash_mla/engine.h"
#include "flash_mla/error.h"
#include "model/temporary_directory.h"

namespace flash_mla {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kPromptTokens = 600;

EngineOptions options(const fs::path& tier) {
  EngineOptions o;
  o.device = EngineOptions::Device::kCpu;
  o.precision = EngineOptions::Precision::kFloat32;
  o.num_pages = 64;
  o.kv_tiers = {"file:" + tier.string() + ",1GiB"};
  o.kv_tier_wait_seconds = 60;  // the machine may be busy
  return o;
}

Request prompt() {
  Request request;
  for (std::size_t i = 0; i < kPromptTokens; ++i) {
    request.prompt_token_ids.push_back(static_cast<std::int32_t>(5 + i * i % 4000));
  }
  request.sampling.temperature = 0;
  request.sampling.max_tokens = 8;
  request.sampling.ignore_eos = true;
  request.sampling.logprobs = 0;
  return request;
}

Completion complete(Engine& engine) { return engine.generate(std::vector{prompt()}).at(0); }

/// Computes the prompt and waits until its two whole chunks are stored.
Completion compute(const fs::path& model, const EngineOptions& o) {
  Engine engine(model, o);
  Completion out = complete(engine);
  for (int i = 0; i < 60000 && engine.stats().kv_tiers[0].tokens_stored < 512; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(engine.stats().kv_tiers[0].tokens_stored, 512);
  return out;
}

/// The same tokens, with the same bits of their probabilities.
void expect_equal(const Completion& a, const Completion& b) {
  EXPECT_EQ(a.choices[0].token_ids, b.choices[0].token_ids);
  ASSERT_EQ(a.choices[0].logprobs.size(), b.choices[0].logprobs.size());
  for (std::size_t i = 0; i < a.choices[0].logprobs.size(); ++i) {
    EXPECT_EQ(a.choices[0].logprobs[i].chosen.logprob, b.choices[0].logprobs[i].chosen.logprob) << i;
  }
}

class TierEngineTest : public testing::TestWithParam<EngineOptions::KvCache> {
 protected:
  TemporaryDirectory directory_;
};

INSTANTIATE_TEST_SUITE_P(Caches, TierEngineTest,
                         testing::Values(EngineOptions::KvCache::kAuto, EngineOptions::KvCache::kFp8));

TEST_P(TierEngineTest, APromptOfOneEngineIsLoadedByTheNext) {
  EngineOptions o = options(directory_.path());
  o.kv_cache = GetParam();
  // In steps of 256 tokens: what is loaded is computed as what was stored.
  o.max_tokens_per_step = 256;
  const Completion first = compute(FLASH_MLA_SMALL_MODEL, o);
  EXPECT_EQ(first.usage.cached_tokens, 0);
  Engine second(FLASH_MLA_SMALL_MODEL, o);
  const Completion loaded = complete(second);
  EXPECT_EQ(loaded.usage.cached_tokens, 512);
  EXPECT_EQ(second.stats().kv_tiers[0].tokens_loaded, 512);
  expect_equal(loaded, first);
}

TEST_F(TierEngineTest, AnIndexersKeysComeAlong) {
  EngineOptions o = options(directory_.path());
  o.max_tokens_per_step = 256;
  const fs::path model = fs::path(FLASH_MLA_SMALL_MODEL).parent_path() / "small-sparse";
  const Completion first = compute(model, o);
  Engine second(model, o);
  const Completion loaded = complete(second);
  EXPECT_EQ(loaded.usage.cached_tokens, 512);
  expect_equal(loaded, first);
}

// In batch-invariant mode a page has the same bits on any number of ranks.
TEST_F(TierEngineTest, RanksLoadWhatOneHasComputedAndTheOtherWayRound) {
  EngineOptions one = options(directory_.path() / "one");
  one.batch_invariant = true;
  EngineOptions two = one;
  two.tp = 2;
  two.num_threads = 2;
  const Completion first = compute(FLASH_MLA_SMALL_MODEL, one);
  {
    Engine ranks(FLASH_MLA_SMALL_MODEL, two);
    const Completion loaded = complete(ranks);
    EXPECT_EQ(loaded.usage.cached_tokens, 512);
    expect_equal(loaded, first);
  }
  one.kv_tiers = two.kv_tiers = {"file:" + (directory_.path() / "two").string() + ",1GiB"};
  expect_equal(compute(FLASH_MLA_SMALL_MODEL, two), first);
  Engine engine(FLASH_MLA_SMALL_MODEL, one);
  const Completion loaded = complete(engine);
  EXPECT_EQ(loaded.usage.cached_tokens, 512);
  expect_equal(loaded, first);
}

// What a rank has computed the others find, too: tiers are those of the engine. The same prompt twice goes to two ranks.
TEST_F(TierEngineTest, RanksWithRequestsOfTheirOwnShareTheTiers) {
  for (const int tp : {1, 2}) {
    SCOPED_TRACE(tp);
    EngineOptions o = options(directory_.path() / std::to_string(tp));
    o.kv_tiers.insert(o.kv_tiers.begin(), "ram:256MiB");
    o.batch_invariant = true;
    o.prefix_cache = false;
    o.tp = tp;
    o.dp = 2;
    o.num_threads = 2 * tp;
    const Completion first = compute(FLASH_MLA_SMALL_MODEL, o);
    Engine engine(FLASH_MLA_SMALL_MODEL, o);
    const std::vector<Completion> loaded = engine.generate(std::vector{prompt(), prompt()});
    for (const Completion& one : loaded) {
      EXPECT_EQ(one.usage.cached_tokens, 512);
      expect_equal(one, first);
    }
    const EngineStats stats = engine.stats();
    ASSERT_EQ(stats.kv_tiers.size(), 2u);
    EXPECT_EQ(stats.kv_tiers[0].tokens_loaded + stats.kv_tiers[1].tokens_loaded, 1024);
    EXPECT_EQ(stats.pages_used, 0);
    for (const std::size_t rank : {0, tp}) EXPECT_GT(stats.ranks.at(rank).computed_tokens, 0);
    EXPECT_EQ(complete(engine).usage.cached_tokens, 512);
    EXPECT_GT(engine.stats().kv_tiers[0].tokens_loaded, 0) << "the slower tier's go into the faster";
  }
}

TEST_F(TierEngineTest, TwoModelsNeverShare) {
  const EngineOptions o = options(directory_.path() / "tier");
  compute(FLASH_MLA_SMALL_MODEL, o);
  // The same model but for one bit of one weight in the middle of the file, with everything else as it was.
  const fs::path other = directory_.path() / "other";
  fs::create_directories(other);
  for (const fs::directory_entry& file : fs::directory_iterator(FLASH_MLA_SMALL_MODEL)) {
    fs::copy_file(file.path(), other / file.path().filename());
  }
  {
    Engine copy(other, o);
    EXPECT_EQ(complete(copy).usage.cached_tokens, 512);  // a copy of a model is that model
  }
  const fs::path weights = other / "model.safetensors";
  std::fstream file(weights, std::ios::binary | std::ios::in | std::ios::out);
  // The last tensor's first value: the header says where tensors lie, and the data of small ones counts in full.
  char byte = 0;
  file.seekg(-2, std::ios::end).get(byte);
  file.seekp(-2, std::ios::end).put(static_cast<char>(byte ^ 1));
  file.close();
  Engine changed(other, o);
  EXPECT_EQ(complete(changed).usage.cached_tokens, 0);
}

TEST_F(TierEngineTest, RowsOfAnotherTypeAreNotTaken) {
  EngineOptions o = options(directory_.path());
  o.kv_cache = EngineOptions::KvCache::kFloat16;
  compute(FLASH_MLA_SMALL_MODEL, o);
  o.kv_cache = EngineOptions::KvCache::kBFloat16;  // of as many bytes
  Engine other(FLASH_MLA_SMALL_MODEL, o);
  EXPECT_EQ(complete(other).usage.cached_tokens, 0);
}

TEST(TierCheckTest, ComesBeforeTheModel) {
  EXPECT_NO_THROW(check_kv_tiers(std::vector<std::string>{"ram:4GiB", "file:/tmp/x,1TB"}));
  EngineOptions o;
  o.kv_tiers = {"tape:1TB"};
  EXPECT_THROW(Engine("no such model", o), InvalidArgument);
  try {
    Engine("no such model", o);
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("tape:1TB"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace flash_mla
