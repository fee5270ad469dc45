// The engine with tiers over the fake model, whose text shows one wrong page.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flash_mla/error.h"
#include "harness.h"
#include "model/temporary_directory.h"

namespace flash_mla::engine {
namespace {

namespace fs = std::filesystem;

/// Whether it comes true within a minute.
bool comes_true(const std::function<bool()>& condition) {
  for (int i = 0; i < 60000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

std::vector<fs::path> chunk_files(const fs::path& directory) {
  std::vector<fs::path> out;
  for (const fs::directory_entry& file : fs::directory_iterator(directory)) {
    if (file.path().extension() == ".kv") out.push_back(file.path());
  }
  return out;
}

std::uintmax_t bytes_in(const fs::path& directory) {
  std::uintmax_t out = 0;
  for (const fs::path& file : chunk_files(directory)) {
    std::error_code gone;  // evicted in the meantime
    const std::uintmax_t bytes = fs::file_size(file, gone);
    if (!gone) out += bytes;
  }
  return out;
}

/// Of whatever the model's launches are.
class TierTransfersTest : public testing::TestWithParam<FakeRuns> {
 protected:
  TierTransfersTest() { Harness::runs = GetParam(); }
  ~TierTransfersTest() override { Harness::runs = FakeRuns::kAtOnce; }

  EngineOptions options(const std::string& size = "1GiB") const {
    EngineOptions o = Harness::defaults();
    o.kv_tiers = {"file:" + directory_.path().string() + "," + size};
    o.kv_tier_wait_seconds = 60;  // the machine may be busy
    return o;
  }
  static KvTierStats tier(const Harness& h, std::size_t index = 0) {
    return h.core->stats().kv_tiers.at(index);
  }
  /// An engine computes the prompt and has stored its whole chunks.
  void compute(const Tokens& prompt) {
    Harness h(options());
    h.generate(prompt, greedy(1));
    const auto whole = static_cast<std::int64_t>(prompt.size()) / 256 * 256;
    ASSERT_TRUE(comes_true([&] { return tier(h).tokens_stored >= whole; }));
  }

  std::mt19937 random_{7};
  TemporaryDirectory directory_;
};

INSTANTIATE_TEST_SUITE_P(All, TierTransfersTest,
                         testing::Values(FakeRuns::kAtOnce, FakeRuns::kEarly, FakeRuns::kLate,
                                         FakeRuns::kEither));

TEST_P(TierTransfersTest, LoadsWhatAnotherEngineHasComputed) {
  const Tokens prompt = random_prompt(random_, 1100);
  compute(prompt);
  Harness h(options());
  const Result result = h.generate(prompt, greedy());
  EXPECT_EQ(result.tokens, continuation(prompt, 20));
  EXPECT_EQ(result.usage.cached_tokens, 1024);
  EXPECT_EQ(tier(h).tokens_looked_up, 1024);
  EXPECT_EQ(tier(h).tokens_found, 1024);
  EXPECT_EQ(tier(h).tokens_loaded, 1024);
  EXPECT_EQ(tier(h).bytes_loaded, 1024 * 4);
  EXPECT_EQ(tier(h).failures, 0);
  EXPECT_EQ(h.core->stats().computed_tokens, 1100 - 1024 + 19);
  // What was loaded is in the prefix cache now, and not asked for again.
  EXPECT_EQ(h.generate(prompt, greedy()).tokens, result.tokens);
  EXPECT_EQ(tier(h).tokens_looked_up, 1024);
}

TEST_P(TierTransfersTest, LeavesAlwaysATokenToBeComputed) {
  const Tokens prompt = random_prompt(random_, 512);
  compute(prompt);
  Harness h(options());
  EXPECT_EQ(h.generate(prompt, greedy()).tokens, continuation(prompt, 20));
  EXPECT_EQ(tier(h).tokens_loaded, 256);
}

TEST_P(TierTransfersTest, LoadsBehindWhatThePrefixCacheHas) {
  const Tokens prompt = random_prompt(random_, 1100);
  compute(prompt);
  Harness h(options());
  // The prefix cache gets five pages, which end within a chunk; others of that chunk are loaded behind them.
  const Tokens begin(prompt.begin(), prompt.begin() + 330);
  std::filesystem::rename(directory_.path(), directory_.path().string() + "-away");
  h.generate(begin, greedy(1));
  std::filesystem::rename(directory_.path().string() + "-away", directory_.path());
  const Result result = h.generate(prompt, greedy());
  EXPECT_EQ(result.tokens, continuation(prompt, 20));
  EXPECT_EQ(result.usage.cached_tokens, 1024);
  EXPECT_EQ(tier(h).tokens_loaded, 768);
}

TEST_P(TierTransfersTest, TextsAreTheSameInEveryLoad) {
  Load load;
  EngineOptions plain = Harness::defaults();
  const auto expected = load.run(plain, 0);
  for (const int stagger : {0, 3, -1}) {
    EXPECT_EQ(load.run(options(), stagger), expected) << stagger;
    EngineOptions small = options();
    small.num_pages = 40;  // sequences are preempted, and come back from the tier
    EXPECT_EQ(load.run(small, stagger), expected) << stagger;
  }
}

TEST_P(TierTransfersTest, TwoHundredRandomPromptsUnderEviction) {
  // A pool of 10 chunks, a tier in memory of some 10 and one in files of some 30.
  EngineOptions o = options("50KB");
  o.num_pages = 40;
  o.kv_tiers.insert(o.kv_tiers.begin(), "ram:20KB");
  Harness h(o);
  std::vector<Tokens> beginnings;
  beginnings.reserve(6);
  for (int i = 0; i < 6; ++i) beginnings.push_back(random_prompt(random_, 300 + random_() % 900));
  std::map<RequestId, Tokens> prompts;
  for (int i = 0; i < 200; ++i) {
    const Tokens& beginning = beginnings[random_() % beginnings.size()];
    const Tokens kept(beginning.begin(),
                      beginning.begin() + static_cast<std::ptrdiff_t>(random_() % beginning.size()));
    const Tokens prompt = random_prompt(random_, kept.size() + 1 + random_() % 300, kept);
    prompts[h.submit(prompt, greedy(4))] = prompt;
    for (std::uint32_t steps = random_() % 8; steps > 0; --steps) h.core->step();
    if (random_() % 10 == 0) h.core->cancel(prompts.begin()->first + random_() % prompts.size());
  }
  h.run();
  int finished = 0;
  for (const auto& [id, prompt] : prompts) {
    const Result& result = h.results[id][0];
    if (result.finish == FinishReason::kCancelled) continue;
    ++finished;
    EXPECT_EQ(result.tokens, continuation(prompt, 4));
  }
  EXPECT_GT(finished, 100);
  EXPECT_GT(tier(h, 0).tokens_stored, 0);
  // Something is loaded sooner or later, whenever the threads come to store it.
  EXPECT_TRUE(comes_true([&] {
    const Tokens& prompt = beginnings[random_() % beginnings.size()];
    EXPECT_EQ(h.generate(prompt, greedy(4)).tokens, continuation(prompt, 4));
    return tier(h, 0).tokens_loaded + tier(h, 1).tokens_loaded > 0;
  }));
  EXPECT_LE(bytes_in(directory_.path()), 50 * 1024U);
}

TEST_P(TierTransfersTest, WrongFilesNeverReachAText) {
  const Tokens prompt = random_prompt(random_, 1100);
  compute(prompt);
  std::vector<fs::path> files = chunk_files(directory_.path());
  ASSERT_EQ(files.size(), 4U);
  std::ranges::sort(files, {},
                    [](const fs::path& p) { return p.stem().string().substr(32); });  // by their place
  // The third chunk is changed: the first two count.
  std::fstream(files[2], std::ios::binary | std::ios::in | std::ios::out).seekp(-100, std::ios::end).put('!');
  {
    Harness h(options());
    EXPECT_EQ(h.generate(prompt, greedy()).tokens, continuation(prompt, 20));
    EXPECT_EQ(tier(h).tokens_found, 1024);
    EXPECT_EQ(tier(h).tokens_loaded, 512);
    EXPECT_EQ(tier(h).failures, 1);
    // A good one takes its place.
    ASSERT_TRUE(comes_true([&] { return chunk_files(directory_.path()).size() == 4; }));
  }
  for (const fs::path& file : chunk_files(directory_.path())) fs::resize_file(file, fs::file_size(file) / 2);
  Harness h(options());
  const Result result = h.generate(prompt, greedy());
  EXPECT_EQ(result.tokens, continuation(prompt, 20));
  EXPECT_EQ(result.usage.cached_tokens, 0);
  EXPECT_EQ(tier(h).failures, 1);
}

TEST_P(TierTransfersTest, OtherModelsAndModesDoNotShare) {
  const Tokens prompt = random_prompt(random_, 600);
  compute(prompt);
  Harness other(options(), 4096, nullptr, "other weights");
  EngineOptions invariant = options();
  invariant.batch_invariant = true;
  Harness by_itself(invariant);
  for (Harness* h : {&other, &by_itself}) {
    EXPECT_EQ(h->generate(prompt, greedy()).usage.cached_tokens, 0);
    EXPECT_EQ(tier(*h).tokens_found, 0);
  }
}

/// A file that nobody can read: who opens it waits for a writer.
class StuckFile {
 public:
  explicit StuckFile(fs::path path) : path_(std::move(path)) {
    fs::remove(path_);
    EXPECT_EQ(mkfifo(path_.c_str(), 0600), 0);
  }
  ~StuckFile() { release(); }
  void release() {
    if (fs::exists(path_)) std::ofstream(path_, std::ios::in | std::ios::out);  // does not wait
    fs::remove(path_);
  }

 private:
  fs::path path_;
};

TEST_P(TierTransfersTest, ATierThatDoesNotAnswerHoldsUpNobody) {
  const Tokens prompt = random_prompt(random_, 1100), other = random_prompt(random_, 700);
  compute(prompt);
  std::vector<fs::path> files = chunk_files(directory_.path());
  std::ranges::sort(files, {}, [](const fs::path& p) { return p.stem().string().substr(32); });
  EngineOptions o = options();
  o.kv_tier_wait_seconds = 0.05;
  Harness h(o);
  StuckFile stuck(files.at(0));
  const RequestId first = h.submit(prompt, greedy()), second = h.submit(other, greedy());
  // Both end although the loader does not come back; what it may still write to is nobody's meanwhile.
  ASSERT_TRUE(comes_true([&] {
    h.core->step();
    return h.ended[first] && h.ended[second];
  }));
  EXPECT_EQ(h.results[first][0].tokens, continuation(prompt, 20));
  EXPECT_EQ(h.results[second][0].tokens, continuation(other, 20));
  stuck.release();
  h.run();  // all pages come back
  EXPECT_EQ(h.generate(prompt, greedy()).tokens, continuation(prompt, 20));
}

TEST_P(TierTransfersTest, ARequestThatLoadsCanBeCancelled) {
  const Tokens prompt = random_prompt(random_, 1100);
  compute(prompt);
  std::vector<fs::path> files = chunk_files(directory_.path());
  std::ranges::sort(files, {}, [](const fs::path& p) { return p.stem().string().substr(32); });
  Harness h(options());
  StuckFile stuck(files.at(1));
  const RequestId id = h.submit(prompt, greedy());
  ASSERT_TRUE(comes_true([&] {
    h.core->step();
    return h.core->stats().pages_used > 0;  // it loads
  }));
  h.core->cancel(id);
  ASSERT_TRUE(comes_true([&] {
    h.core->step();
    return h.ended[id];
  }));
  EXPECT_EQ(h.results[id][0].finish, FinishReason::kCancelled);
  EXPECT_GT(h.core->stats().pages_used, 0);  // the loader may still write to them
  const Tokens other = random_prompt(random_, 200);
  const RequestId next = h.submit(other, greedy());
  ASSERT_TRUE(comes_true([&] {
    h.core->step();
    return h.ended[next];
  }));
  EXPECT_EQ(h.results[next][0].tokens, continuation(other, 20));
  stuck.release();
  h.run();
}

TEST_P(TierTransfersTest, ADirectoryThatIsGoneIsAMiss) {
  const Tokens prompt = random_prompt(random_, 1100);
  compute(prompt);
  Harness h(options());
  fs::remove_all(directory_.path());
  EXPECT_EQ(h.generate(prompt, greedy()).tokens, continuation(prompt, 20));
  ASSERT_TRUE(comes_true([&] { return tier(h).failures >= 4; }));
  EXPECT_EQ(tier(h).tokens_stored, 0);
  fs::create_directories(directory_.path());
}

TEST_P(TierTransfersTest, WhatThePoolLostComesBackFromMemory) {
  EngineOptions o = options();
  o.kv_tiers = {"ram:1MB"};
  o.num_pages = 20;
  Harness h(o);
  const Tokens prompt = random_prompt(random_, 1100);
  EXPECT_EQ(h.generate(prompt, greedy()).tokens, continuation(prompt, 20));
  h.generate(random_prompt(random_, 1200), greedy(2));
  ASSERT_TRUE(comes_true([&] { return tier(h).tokens_stored >= 2048; }));
  const Result again = h.generate(prompt, greedy());
  EXPECT_EQ(again.tokens, continuation(prompt, 20));
  EXPECT_EQ(tier(h).tokens_loaded, 1024);
}

TEST(TierOptionsTest, AreChecked) {
  EngineOptions o = Harness::defaults();
  o.kv_tiers = {"ram:1000"};
  EXPECT_THROW(Harness{o}, InvalidArgument);  // less than a chunk
  o.kv_tiers = {"ram:1GB"};
  o.kv_tier_wait_seconds = -1;
  EXPECT_THROW(Harness{o}, InvalidArgument);
}

}  // namespace
}  // namespace flash_mla::engine
