// Tiers by themselves: what they keep, for how long, and what they never give back.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "flash_mla/error.h"
#include "kv/kv_tier.h"
#include "model/temporary_directory.h"

namespace flash_mla::kv {
namespace {

namespace fs = std::filesystem;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kBytes = 3000;
// Of a chunk's file: at most so much besides its bytes and tokens.
constexpr std::size_t kOverhead = 200;

TierConfig config(const std::string& salt = "a model") {
  return {salt, kBytes, [] { return allocate_aligned(kBytes); }};
}

Tokens tokens_of(int chunks, std::uint32_t seed) {
  std::mt19937 random(seed);
  Tokens out(static_cast<std::size_t>(chunks * kChunkTokens));
  for (std::int32_t& token : out) token = static_cast<std::int32_t>(random() % 100000);
  return out;
}

/// The bytes that a chunk of these tokens has.
Buffer bytes_of(std::span<const std::int32_t> tokens) {
  Buffer out = allocate_aligned(kBytes);
  std::seed_seq seed(tokens.begin(), tokens.end());
  std::mt19937 random(seed);
  for (std::size_t i = 0; i < kBytes; ++i) out.data()[i] = static_cast<std::byte>(random());
  return out;
}

std::span<const std::int32_t> chunks(const Tokens& tokens, std::int64_t count) {
  return std::span(tokens).first(static_cast<std::size_t>(count * kChunkTokens));
}

void store_all(KvTier& tier, const Tokens& tokens) {
  for (std::int64_t i = 1; i <= std::ssize(tokens) / kChunkTokens; ++i) {
    EXPECT_TRUE(tier.store(chunks(tokens, i), bytes_of(chunks(tokens, i))));
  }
}

/// Leading chunks that it has, each of them with the right bytes.
std::int64_t good_chunks(KvTier& tier, const Tokens& tokens) {
  const std::unique_ptr<TierMatch> match = tier.look_up(tokens);
  if (!match) return 0;
  for (std::int64_t i = 0; i < match->num_chunks(); ++i) {
    const Buffer bytes = match->read(i);
    if (bytes.data() == nullptr) return i;
    EXPECT_EQ(bytes.bytes(), kBytes);
    EXPECT_EQ(std::memcmp(bytes.data(), bytes_of(chunks(tokens, i + 1)).data(), kBytes), 0);
  }
  return match->num_chunks();
}

std::uintmax_t bytes_in(const fs::path& directory) {
  std::uintmax_t out = 0;
  for (const fs::directory_entry& file : fs::directory_iterator(directory)) out += file.file_size();
  return out;
}

std::vector<fs::path> files_in(const fs::path& directory) {
  std::vector<fs::path> out;
  for (const fs::directory_entry& file : fs::directory_iterator(directory)) out.push_back(file.path());
  std::ranges::sort(out);
  return out;
}

class TiersTest : public testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<KvTier> make(std::size_t bytes, const std::string& salt = "a model") const {
    return std::string(GetParam()) == "ram" ? make_ram_tier(bytes, config(salt))
                                            : make_file_tier(directory_.path() / "tier", bytes, config(salt));
  }
  TemporaryDirectory directory_;
};

INSTANTIATE_TEST_SUITE_P(All, TiersTest, testing::Values("ram", "file"),
                         [](const auto& tier) { return std::string(tier.param); });

TEST_P(TiersTest, GivesBackTheLeadingChunksOfAPrompt) {
  const std::unique_ptr<KvTier> tier = make(1 << 20);
  EXPECT_STREQ(tier->name(), GetParam());
  const Tokens tokens = tokens_of(5, 1);
  EXPECT_EQ(good_chunks(*tier, tokens), 0);
  store_all(*tier, tokens);
  EXPECT_EQ(good_chunks(*tier, tokens), 5);
  // A prompt that ends within a chunk, goes on, or goes another way.
  EXPECT_EQ(good_chunks(*tier, {tokens.begin(), tokens.begin() + 700}), 2);
  Tokens longer = tokens;
  longer.resize(std::size_t{6} * kChunkTokens, 7);
  EXPECT_EQ(good_chunks(*tier, longer), 5);
  for (const std::size_t at : {std::size_t{0}, std::size_t{255}, std::size_t{256}, std::size_t{1279}}) {
    Tokens other = tokens;
    ++other[at];
    EXPECT_EQ(good_chunks(*tier, other), static_cast<std::int64_t>(at) / kChunkTokens) << at;
  }
  EXPECT_EQ(good_chunks(*tier, {}), 0);
}

TEST_P(TiersTest, KeepsNoMoreThanItMayAndWhatWasUsedLast) {
  constexpr std::size_t kLimit = 40 * (kBytes + 16 * kChunkTokens + kOverhead);
  const std::unique_ptr<KvTier> tier = make(kLimit);
  std::mt19937 random(5);
  const Tokens favourite = tokens_of(4, 1000);
  store_all(*tier, favourite);
  for (std::uint32_t i = 0; i < 200; ++i) {
    const Tokens tokens = tokens_of(1 + static_cast<int>(random() % 4), i);
    store_all(*tier, tokens);
    EXPECT_EQ(good_chunks(*tier, tokens), std::ssize(tokens) / kChunkTokens);
    EXPECT_EQ(good_chunks(*tier, favourite), 4) << i;
    if (std::string(GetParam()) == "file") {
      ASSERT_LE(bytes_in(directory_.path() / "tier"), kLimit);
    }
  }
  int kept = 0;
  for (std::uint32_t i = 0; i < 200; ++i) kept += good_chunks(*tier, tokens_of(1, i)) > 0;
  EXPECT_GE(kept, 5);
  EXPECT_LE(kept, 40);
}

TEST_P(TiersTest, RefusesWhatIsLargerThanItself) {
  const std::unique_ptr<KvTier> tier = make(kBytes);
  const Tokens tokens = tokens_of(1, 1);
  EXPECT_FALSE(tier->store(tokens, bytes_of(tokens)));
  EXPECT_EQ(good_chunks(*tier, tokens), 0);
}

class FileTierTest : public testing::Test {
 protected:
  std::unique_ptr<KvTier> make(std::size_t bytes = 1 << 20, const std::string& salt = "a model") const {
    return make_file_tier(directory_.path(), bytes, config(salt));
  }
  TemporaryDirectory directory_;
};

TEST_F(FileTierTest, SurvivesARestart) {
  const Tokens tokens = tokens_of(3, 1);
  store_all(*make(), tokens);
  EXPECT_EQ(good_chunks(*make(), tokens), 3);
  // With less room: what goes is the end of the prompt.
  EXPECT_EQ(good_chunks(*make(2 * (kBytes + 8 * kChunkTokens + kOverhead)), tokens), 2);
}

TEST_F(FileTierTest, ModelsDoNotShare) {
  const std::unique_ptr<KvTier> one = make(1 << 20, "one"), other = make(1 << 20, "other");
  const Tokens tokens = tokens_of(2, 1);
  store_all(*one, tokens);
  EXPECT_EQ(good_chunks(*other, tokens), 0);
  EXPECT_EQ(good_chunks(*one, tokens), 2);
  // Not even where a file of the one lies under the other's name.
  const std::vector<fs::path> before = files_in(directory_.path());
  store_all(*other, tokens);
  for (const fs::path& file : files_in(directory_.path())) {
    if (std::ranges::count(before, file) > 0) continue;
    const std::string place = file.stem().string().substr(32);
    for (const fs::path& of_one : before) {
      if (of_one.stem().string().ends_with(place))
        fs::copy_file(of_one, file, fs::copy_options::overwrite_existing);
    }
  }
  EXPECT_EQ(good_chunks(*other, tokens), 0);
}

TEST_F(FileTierTest, ATornFileIsAMissAndGoes) {
  const Tokens tokens = tokens_of(1, 1);
  std::uintmax_t size = 0;
  for (const double share : {0.0, 0.001, 0.01, 0.2, 0.7, 0.9999, 1.1}) {
    const std::unique_ptr<KvTier> tier = make();
    store_all(*tier, tokens);
    const std::vector<fs::path> files = files_in(directory_.path());
    ASSERT_EQ(files.size(), 1U);
    size = fs::file_size(files[0]);
    fs::resize_file(files[0], static_cast<std::uintmax_t>(static_cast<double>(size) * share));
    EXPECT_EQ(good_chunks(*tier, tokens), 0) << share;
    EXPECT_TRUE(files_in(directory_.path()).empty());
    store_all(*tier, tokens);
    EXPECT_EQ(good_chunks(*tier, tokens), 1) << share;
  }
}

TEST_F(FileTierTest, AChangedByteIsAMiss) {
  const Tokens tokens = tokens_of(1, 1);
  const std::unique_ptr<KvTier> tier = make();
  store_all(*tier, tokens);
  const fs::path file = files_in(directory_.path()).at(0);
  const auto size = static_cast<std::streamoff>(fs::file_size(file));
  for (std::streamoff at = 0; at < size; at += 1 + at / 7) {
    std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
    char byte = 0;
    stream.seekg(at).read(&byte, 1);
    stream.seekp(at).put(static_cast<char>(byte ^ 0x10));
    stream.close();
    EXPECT_EQ(good_chunks(*tier, tokens), 0) << at;
    EXPECT_TRUE(tier->store(tokens, bytes_of(tokens)));
    ASSERT_EQ(good_chunks(*tier, tokens), 1) << at;
  }
}

TEST_F(FileTierTest, SharesItsDirectoryAndLeavesOtherFilesAlone) {
  const fs::path stranger = directory_.path() / "notes.txt", left = directory_.path() / ".tmp-1-1";
  std::ofstream(stranger) << "mine";
  std::ofstream(left) << "half a chunk";
  fs::last_write_time(left, fs::file_time_type::clock::now() - std::chrono::hours(3));
  constexpr std::size_t kLimit = 20 * (kBytes + 4 * kChunkTokens + kOverhead);
  const std::unique_ptr<KvTier> one = make(kLimit), other = make(kLimit);
  EXPECT_FALSE(fs::exists(left));
  for (std::uint32_t i = 0; i < 60; ++i) {
    const Tokens tokens = tokens_of(1, i);
    store_all(i % 2 == 0 ? *one : *other, tokens);
    EXPECT_EQ(good_chunks(i % 2 == 0 ? *other : *one, tokens), 1);
    // Each looks what the others have written once in a while.
    EXPECT_LE(bytes_in(directory_.path()), kLimit + kLimit / 8);
  }
  EXPECT_TRUE(fs::exists(stranger));
}

TEST_F(FileTierTest, WhatIsGoneIsAMiss) {
  const Tokens tokens = tokens_of(3, 1);
  const std::unique_ptr<KvTier> tier = make();
  store_all(*tier, tokens);
  const std::unique_ptr<TierMatch> match = tier->look_up(tokens);
  ASSERT_EQ(match->num_chunks(), 3);
  for (const fs::path& file : files_in(directory_.path())) fs::remove(file);
  EXPECT_EQ(match->read(1).data(), nullptr);
  fs::remove_all(directory_.path());
  EXPECT_EQ(good_chunks(*tier, tokens), 0);
  EXPECT_FALSE(tier->store(chunks(tokens, 1), bytes_of(chunks(tokens, 1))));
  fs::create_directories(directory_.path());
  store_all(*tier, tokens);
  EXPECT_EQ(good_chunks(*tier, tokens), 3);
}

void expect_refused(const std::string& spec, const std::string& message) {
  try {
    make_tiers(std::vector{spec}, config());
    ADD_FAILURE() << spec << " was taken";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("kv_tiers"), std::string::npos) << e.what();
  }
}

TEST(MakeTiersTest, ReadsSpecifications) {
  const TemporaryDirectory directory;
  const std::string path = directory.path().string();
  const std::vector<std::string> specs = {"ram:3000", "ram:4KiB", "file:" + path + "/a,b,1mb", "ram:1 GiB"};
  expect_refused(specs[3], "has no size");
  const auto tiers = make_tiers(std::span(specs).first(3), config());
  ASSERT_EQ(tiers.size(), 3U);
  EXPECT_STREQ(tiers[0]->name(), "ram");
  EXPECT_STREQ(tiers[2]->name(), "file");
  EXPECT_TRUE(fs::is_directory(path + "/a,b"));
  EXPECT_TRUE(make_tiers({}, config()).empty());
  for (const char* spec : {"", "disk:4GB", "RAM:4GB", "/tmp,4GB"}) expect_refused(spec, "is no tier");
  for (const char* spec : {"ram:", "ram:x", "ram:-1", "ram:4XB", "ram:99999999TiB", "file:/tmp,"}) {
    expect_refused(spec, "has no size");
  }
  for (const char* spec : {"file:", "file:/tmp", "file:,4GB"})
    expect_refused(spec, "names no directory or no size");
  expect_refused("ram:2999", "expected at least the 3000 of a chunk of 256 tokens");
  for (const char* spec : {"lmcache://", "lmcache://host", "lmcache://:5599", "lmcache://host:0",
                           "lmcache://host:65536", "lmcache://host:5599/x", "lmcache://host:x"}) {
    expect_refused(spec, "names no host and port");
  }
  expect_refused("lmcache:host:5599", "is no tier");
  std::ofstream(path + "/plain") << "a file";
  expect_refused("file:" + path + "/plain,1GB", "cannot be");
}

TEST(MakeTiersTest, AServerIsTakenWhereThisBuildHasAClient) {
  const std::vector<std::string> server = {"ram:4KiB", "lmcache://127.0.0.1:5599"}, none = {"ram:4KiB"};
  EXPECT_THROW(check_tiers(none, /*shared=*/true), InvalidArgument);
  if (!why_no_lmcache().empty()) {
    EXPECT_THROW(check_tiers(server), Unsupported);
    return;
  }
  check_tiers(server);
  check_tiers(server, /*shared=*/true);
  EXPECT_STREQ(make_tiers(server, config()).at(1)->name(), "lmcache");
  TierConfig other = config();
  other.shared = {"a model", 3};  // of 3000 bytes
  EXPECT_THROW(make_tiers(server, other), InvalidArgument);
}

// Nobody listens: every call fails at once, and says why.
TEST(LmCacheTier, AServerThatIsNotThereFails) {
  if (!why_no_lmcache().empty()) GTEST_SKIP() << why_no_lmcache();
  const auto tier = make_lmcache_tier("127.0.0.1:1", config());
  const std::vector<std::int32_t> tokens(512, 7);
  EXPECT_EQ(tier->look_up(std::span(tokens).first(255)), nullptr) << "less than a chunk";
  EXPECT_THROW(tier->look_up(tokens), std::runtime_error);
  EXPECT_THROW(tier->store(tokens, config().allocate()), std::runtime_error);
}

}  // namespace
}  // namespace flash_mla::kv
