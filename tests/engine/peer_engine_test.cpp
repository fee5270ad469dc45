// Prefill and decode as two engines, under a real model: models/small, by the public engine.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "flash_mla/engine.h"
#include "flash_mla/error.h"
#include "model/temporary_directory.h"
#include "sanitized.h"

namespace flash_mla {
namespace {

namespace fs = std::filesystem;
using KvCache = EngineOptions::KvCache;

const fs::path kSmall = FLASH_MLA_SMALL_MODEL;
const fs::path kSparse = fs::path(FLASH_MLA_SMALL_MODEL).parent_path() / "small-sparse";

/// NIXL where tests/transfer/run.sh says where it is.
std::string transport() { return std::getenv("FLASH_MLA_NIXL") != nullptr ? "nixl" : "shm"; }

// The machine may be busy.
void wait_until(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), end);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

EngineOptions options() {
  EngineOptions o;
  o.device = EngineOptions::Device::kCpu;
  o.precision = EngineOptions::Precision::kFloat32;
  o.num_pages = 64;
  o.num_threads = 1;
  o.batch_invariant = true;  // the same bits however a prompt is cut
  o.transfer.transport = transport();
  o.transfer.port = 0;
  o.transfer.lease_seconds = 100;
  o.transfer.memory_bytes = std::size_t{64} << 20;
  return o;
}

Request request(std::size_t prompt_tokens, int max_tokens = 8, std::size_t seed = 1) {
  Request out;
  for (std::size_t i = 0; i < prompt_tokens; ++i) {
    out.prompt_token_ids.push_back(static_cast<std::int32_t>(5 + (i * i + 7 * seed) % 4000));
  }
  out.sampling.temperature = 0;
  out.sampling.max_tokens = max_tokens;
  out.sampling.ignore_eos = true;
  out.sampling.logprobs = 0;
  return out;
}

/// The end of a request that was submitted, whenever it comes.
struct Outcome {
  std::mutex mutex;
  std::vector<std::int32_t> tokens;
  std::string error;
  FinishReason finish = FinishReason::kNone;
  std::atomic<bool> over = false;
};

std::shared_ptr<Outcome> submit(Engine& engine, Request r, RequestId* id = nullptr) {
  auto out = std::make_shared<Outcome>();
  const RequestId submitted = engine.submit(std::move(r), [out](const GenerationEvent& e) {
    const std::lock_guard lock(out->mutex);
    if (e.index == 0) {
      out->tokens.insert(out->tokens.end(), e.token_ids.begin(), e.token_ids.end());
      out->finish = e.finish;
      out->error = e.error;
    }
    if (e.last) out->over = true;
  });
  if (id != nullptr) *id = submitted;
  return out;
}

std::int64_t fallbacks(const Engine& engine, const std::string& why) {
  const EngineStats stats = engine.stats();
  for (const auto& [name, count] : stats.transfer.fallbacks) {
    if (name == why) return count;
  }
  return 0;
}

/// The same tokens, with the same bits of their probabilities.
void expect_equal(const Completion& a, const Completion& b) {
  ASSERT_EQ(a.choices.size(), b.choices.size());
  for (std::size_t c = 0; c < a.choices.size(); ++c) {
    EXPECT_EQ(a.choices[c].token_ids, b.choices[c].token_ids);
    ASSERT_EQ(a.choices[c].logprobs.size(), b.choices[c].logprobs.size());
    for (std::size_t i = 0; i < a.choices[c].logprobs.size(); ++i) {
      EXPECT_EQ(a.choices[c].logprobs[i].chosen.logprob, b.choices[c].logprobs[i].chosen.logprob) << i;
    }
  }
}

/// A prefill and a decode engine that run, each with pages, threads and options of its own.
struct Two {
  explicit Two(EngineOptions o, const fs::path& model = kSmall,
               const std::function<void(EngineOptions&)>& of_decode = {})
      : prefill(model, as_prefill(o)), decode(model, as_decode(o, prefill.stats().transfer.port, of_decode)) {
    prefill.start();
    decode.start();
  }
  static EngineOptions as_prefill(EngineOptions o) {
    o.transfer.role = TransferRole::kPrefill;
    return o;
  }
  static EngineOptions as_decode(EngineOptions o, int port,
                                 const std::function<void(EngineOptions&)>& change) {
    o.transfer.role = TransferRole::kDecode;
    o.transfer.peers = {"127.0.0.1:" + std::to_string(port)};
    if (change) change(o);
    return o;
  }
  Request in_room(Request r, std::int64_t room) const {
    r.bootstrap = BootstrapRoom{"127.0.0.1", prefill.stats().transfer.port, room};
    return r;
  }
  /// To both, as a router does; the decode side's answer. The prefill's is its first token.
  Completion run(Request r, std::int64_t room) {
    r = in_room(std::move(r), room);
    const auto first = submit(prefill, r);
    Completion out = decode.generate(std::vector{r}).at(0);
    wait_until([&] { return first->over.load(); });
    EXPECT_EQ(first->error, "");
    EXPECT_EQ(first->tokens.size(), r.sampling.max_tokens > 0 ? 1U : 0U);
    if (!first->tokens.empty()) {
      EXPECT_EQ(first->tokens[0], out.choices[0].token_ids[0]);
    }
    return out;
  }
  void expect_idle() {
    for (Engine* engine : {&prefill, &decode}) {
      wait_until([&] {
        const EngineStats s = engine->stats();
        return s.pages_used == 0 && s.running == 0 && s.waiting == 0 && s.transfer.open == 0;
      });
    }
  }
  Engine prefill, decode;
};

struct Case {
  const char* name;
  fs::path model;
  KvCache kv_cache;
  std::int64_t layerwise_tokens;
};

class PeerEngineTest : public testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(Caches, PeerEngineTest,
                         testing::Values(Case{"fp32", kSmall, KvCache::kAuto, 8192},
                                         Case{"fp32_by_layer", kSmall, KvCache::kAuto, 100},
                                         Case{"bf16", kSmall, KvCache::kBFloat16, 8192},
                                         Case{"fp16_by_layer", kSmall, KvCache::kFloat16, 100},
                                         Case{"fp8", kSmall, KvCache::kFp8, 8192},
                                         Case{"fp8_by_layer", kSmall, KvCache::kFp8, 100},
                                         Case{"indexer", kSparse, KvCache::kAuto, 8192},
                                         Case{"indexer_fp8_by_layer", kSparse, KvCache::kFp8, 100}),
                         [](const auto& of) { return of.param.name; });

TEST_P(PeerEngineTest, TokensAreThoseOfOneEngine) {
  EngineOptions o = options();
  o.kv_cache = GetParam().kv_cache;
  o.max_tokens_per_step = 192;  // several steps, at whose ends pages are not full
  o.transfer.layerwise_tokens = GetParam().layerwise_tokens;
  Engine one(GetParam().model, o);
  Two two(o, GetParam().model);
  std::int64_t room = 0, pages = 0;
  // Of one page, of whole pages, of whole pages and a token, of several steps.
  for (const std::size_t length : {40, 128, 129, 700}) {
    SCOPED_TRACE(length);
    const Request r = request(length, 8, length);
    const Completion alone = one.generate(std::vector{r}).at(0);
    const Completion together = two.run(r, ++room);
    expect_equal(together, alone);
    EXPECT_EQ(together.usage.cached_tokens, static_cast<std::int64_t>(length) - 1);
    pages += static_cast<std::int64_t>(length + 63) / 64;
  }
  two.expect_idle();
  const EngineStats sent = two.prefill.stats(), received = two.decode.stats();
  EXPECT_EQ(received.transfer.handed_over, room);
  EXPECT_EQ(sent.transfer.handed_over, room);
  EXPECT_EQ(received.transfer.bytes, pages * static_cast<std::int64_t>(received.bytes_per_page));
  EXPECT_EQ(sent.transfer.bytes, received.transfer.bytes);
  EXPECT_TRUE(received.transfer.fallbacks.empty());
  EXPECT_TRUE(sent.transfer.fallbacks.empty());
}

TEST(PeerTest, PrefixesThatEitherSideHasAreUsed) {
  EngineOptions o = options();
  o.max_tokens_per_step = 256;
  Engine one(kSmall, o);
  Two two(o);
  const Request r = request(400);
  const Completion alone = one.generate(std::vector{r}).at(0);
  expect_equal(two.run(r, 1), alone);
  // Both have it all now; the decode side wants nothing, and says so.
  expect_equal(two.run(r, 2), alone);
  EXPECT_EQ(fallbacks(two.decode, "unneeded"), 1);
  // A longer one: the prefill side computes what is new and sends all, the decode side keeps what it has.
  Request longer = r;
  for (int i = 0; i < 300; ++i) longer.prompt_token_ids.push_back(10 + i);
  expect_equal(two.run(longer, 3), one.generate(std::vector{longer}).at(0));
  EXPECT_EQ(two.decode.stats().transfer.handed_over, 2);
  two.expect_idle();
}

// Ranks that share a model have the same pages, which go to all of them.
TEST(PeerTest, RanksOfEitherSide) {
  EngineOptions o = options();
  o.max_tokens_per_step = 192;
  o.transfer.layerwise_tokens = 300;
  Engine one(kSmall, o);
  for (const bool of_prefill : {false, true}) {
    EngineOptions ranks = o;
    ranks.tp = 2;
    ranks.num_threads = 2;
    Two two(of_prefill ? ranks : o, kSmall, [&](EngineOptions& e) { e.tp = of_prefill ? 1 : 2; });
    for (const std::size_t length : {200, 500})
      expect_equal(two.run(request(length), static_cast<std::int64_t>(length)),
                   one.generate(std::vector{request(length)}).at(0));
    EXPECT_EQ(two.decode.stats().transfer.handed_over, 2);
    two.expect_idle();
  }
}

// Ranks with caches of their own have one address: a room's pages come from whichever computes them, to whichever decodes.
TEST(PeerTest, RanksWithCachesOfTheirOwn) {
  EngineOptions o = options();
  o.max_tokens_per_step = 192;
  o.transfer.layerwise_tokens = 300;
  Engine one(kSmall, o);
  for (const auto& [of_prefill, of_decode] : {std::pair(2, 1), std::pair(1, 2), std::pair(2, 2)}) {
    SCOPED_TRACE(testing::Message() << of_prefill << " and " << of_decode);
    EngineOptions ranks = o;
    ranks.dp = of_prefill;
    ranks.num_threads = 2;
    Two two(ranks, kSmall, [&, n = of_decode](EngineOptions& e) { e.dp = n; });
    // At once, so that all ranks have some.
    const std::vector<std::size_t> lengths = {200, 210, 500, 510, 40, 64};
    std::vector<std::shared_ptr<Outcome>> first, whole;
    for (const std::size_t length : lengths) {
      const Request r = two.in_room(request(length, 8, length), static_cast<std::int64_t>(length));
      first.push_back(submit(two.prefill, r));
      whole.push_back(submit(two.decode, r));
    }
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      wait_until([&] { return first[i]->over && whole[i]->over; });
      EXPECT_EQ(first[i]->error, "");
      const Completion alone = one.generate(std::vector{request(lengths[i], 8, lengths[i])}).at(0);
      EXPECT_EQ(whole[i]->tokens, alone.choices[0].token_ids) << lengths[i];
    }
    two.expect_idle();
    const EngineStats sent = two.prefill.stats(), received = two.decode.stats();
    EXPECT_EQ(sent.transfer.handed_over, std::ssize(lengths));
    EXPECT_EQ(received.transfer.handed_over, std::ssize(lengths));
    EXPECT_EQ(sent.transfer.rooms, std::ssize(lengths));
    EXPECT_TRUE(received.transfer.fallbacks.empty());
    for (const EngineStats& stats : {sent, received}) {
      for (const RankStats& rank : stats.ranks) EXPECT_GT(rank.pages_cached, 0);
    }
  }
}

/// Until the first tier has stored so many tokens.
void wait_until_stored(const Engine& engine, std::int64_t tokens) {
  wait_until([&] { return engine.stats().kv_tiers.at(0).tokens_stored >= tokens; });
}

class PeerTiersTest : public testing::TestWithParam<int> {};  // ranks with caches of their own

INSTANTIATE_TEST_SUITE_P(Ranks, PeerTiersTest, testing::Values(1, 2));

// What the prefill side's tiers have is sent, too, and not computed.
TEST_P(PeerTiersTest, APrefillSideSendsWhatItsTiersHave) {
  const TemporaryDirectory directory;
  EngineOptions o = options();
  o.max_tokens_per_step = 256;  // what is loaded is computed as what was stored
  o.dp = GetParam();
  o.num_threads = GetParam();
  EngineOptions with_tier = o;
  with_tier.kv_tiers = {"file:" + directory.path().string() + ",1GiB"};
  with_tier.kv_tier_wait_seconds = 100;  // the machine may be busy
  const Request r = request(700);
  Completion alone;
  {
    Engine one(kSmall, with_tier);
    alone = one.generate(std::vector{r}).at(0);
    wait_until_stored(one, 512);
  }
  for (const std::int64_t layerwise : {8192, 300}) {
    with_tier.transfer.layerwise_tokens = layerwise;
    Two two(with_tier, kSmall, [](EngineOptions& e) { e.kv_tiers.clear(); });
    expect_equal(two.run(r, 1), alone);
    EXPECT_EQ(two.prefill.stats().kv_tiers.at(0).tokens_loaded, 512);
    std::int64_t computed = 0;
    for (const StepRecord& step : two.prefill.timeline()) computed += step.prefill_tokens;
    EXPECT_EQ(computed, 700 - 512);
    EXPECT_EQ(two.decode.stats().transfer.handed_over, 1);
    EXPECT_TRUE(two.decode.stats().kv_tiers.empty());
    two.expect_idle();
    // Nothing is asked for whose pages nobody wants: a room without a decode server ends as it does without tiers.
    RequestId id = 0;
    const auto waits = submit(two.prefill, two.in_room(request(700, 8, 2), 2), &id);
    two.prefill.cancel(id);
    wait_until([&] { return waits->over.load(); });
    EXPECT_EQ(two.prefill.stats().kv_tiers.at(0).tokens_looked_up, 512);
    two.expect_idle();
  }
}

// A decode side's tiers get what comes from the prefill side, and stand in for it.
TEST_P(PeerTiersTest, ADecodeSideAsksItsTiersWhereNoPagesCome) {
  const TemporaryDirectory directory;
  EngineOptions o = options();
  o.max_tokens_per_step = 256;
  o.dp = GetParam();
  o.num_threads = GetParam();
  o.transfer.lease_seconds = 100;
  Engine one(kSmall, o);
  const auto with_tier = [&](EngineOptions& e) {
    e.kv_tiers = {"file:" + directory.path().string() + ",1GiB"};
    e.kv_tier_wait_seconds = 100;
  };
  const Request r = request(700), other = request(600, 8, 2);
  const Completion alone = one.generate(std::vector{r}).at(0);
  {
    Two two(o, kSmall, with_tier);
    expect_equal(two.run(r, 1), alone);
    EXPECT_EQ(two.decode.stats().transfer.handed_over, 1);
    EXPECT_EQ(two.decode.stats().kv_tiers.at(0).tokens_looked_up, 0) << "the room goes first";
    wait_until_stored(two.decode, 512);
    two.expect_idle();
  }
  // One that has none of it in its cache, and a prefill server that is gone.
  Two two(o, kSmall, [&](EngineOptions& e) {
    with_tier(e);
    e.transfer.peers = {"*"};
  });
  Request nobody = r;
  nobody.bootstrap = BootstrapRoom{"127.0.0.1", 1, 1};
  const Completion loaded = two.decode.generate(std::vector{nobody}).at(0);
  expect_equal(loaded, alone);
  EXPECT_EQ(loaded.usage.cached_tokens, 512);
  EXPECT_EQ(two.decode.stats().kv_tiers.at(0).tokens_loaded, 512);
  EXPECT_EQ(fallbacks(two.decode, "gone"), 1);
  // Without a room, and with one for what no tier has.
  expect_equal(two.decode.generate(std::vector{other}).at(0), one.generate(std::vector{other}).at(0));
  expect_equal(two.run(request(600, 8, 3), 3), one.generate(std::vector{request(600, 8, 3)}).at(0));
  EXPECT_EQ(two.decode.stats().transfer.handed_over, 1);
  two.expect_idle();
}

TEST(PeerTest, WhatARequestAsksForIsAnswered) {
  EngineOptions o = options();
  Engine one(kSmall, o);
  Two two(o);
  Request r = request(200, 6);
  r.sampling.n = 3;
  r.sampling.temperature = 0.8;
  r.sampling.seed = 5;
  r.sampling.frequency_penalty = 0.5;
  r.sampling.min_tokens = 4;
  r.sampling.logprobs = 2;
  expect_equal(two.run(r, 1), one.generate(std::vector{r}).at(0));
  // The prompt's own log-probabilities are computed here; the prefill server is told that it is not needed.
  Request scored = request(150, 4, 2);
  scored.sampling.prompt_logprobs = 0;
  const Completion alone = one.generate(std::vector{scored}).at(0), together = two.run(scored, 2);
  expect_equal(together, alone);
  EXPECT_EQ(together.prompt_logprobs.size(), alone.prompt_logprobs.size());
  // Beside requests without rooms.
  const Request plain = request(100, 4, 3);
  expect_equal(two.decode.generate(std::vector{plain}).at(0), one.generate(std::vector{plain}).at(0));
  expect_equal(two.prefill.generate(std::vector{plain}).at(0), one.generate(std::vector{plain}).at(0));
  two.expect_idle();
}

TEST(PeerTest, SidesThatDifferComputeByThemselvesAndSayWhy) {
  EngineOptions o = options();
  o.transfer.lease_seconds = 0.5;
  struct Difference {
    std::function<void(EngineOptions&)> change;
    std::string words;
  };
  const std::vector<Difference> differences = {
      {[](EngineOptions& e) { e.kv_cache = KvCache::kFp8; }, "page_format is"},
      {[](EngineOptions& e) { e.batch_invariant = false; }, "batch_invariant is false, expected true"},
      {[](EngineOptions& e) { e.quantize = EngineOptions::Quantize::kInt8; }, "weights is"},
      {[](EngineOptions& e) { e.transfer.key = "another"; }, "the key is wrong"}};
  const Request r = request(150);
  for (const Difference& difference : differences) {
    Two two(o, kSmall, difference.change);
    EngineOptions alone = options();
    difference.change(alone);
    Engine one(kSmall, alone);
    const Request in_room = two.in_room(r, 1);
    const auto first = submit(two.prefill, in_room);
    const Completion answer = two.decode.generate(std::vector{in_room}).at(0);
    EXPECT_EQ(answer.choices[0].finish, FinishReason::kLength);
    expect_equal(answer, one.generate(std::vector{r}).at(0));
    EXPECT_EQ(fallbacks(two.decode, "refused"), 1);
    const std::string why = two.decode.stats().transfer.last_trouble;
    EXPECT_NE(why.find(difference.words), std::string::npos) << why;
    wait_until([&] { return first->over.load(); });
    EXPECT_EQ(first->finish, FinishReason::kError);
    EXPECT_NE(first->error.find("no decode server has asked"), std::string::npos) << first->error;
    two.expect_idle();
  }
}

TEST(PeerTest, APrefillSideThatIsGoneOrLateCostsNoAnswer) {
  EngineOptions o = options();
  Engine one(kSmall, o);
  const Request r = request(150);
  const Completion alone = one.generate(std::vector{r}).at(0);
  {
    Two two(o, kSmall, [](EngineOptions& e) {
      e.transfer.peers = {"127.0.0.1:1"};
      e.transfer.lease_seconds = 1;
    });
    Request nobody = r;
    nobody.bootstrap = BootstrapRoom{"127.0.0.1", 1, 1};
    expect_equal(two.decode.generate(std::vector{nobody}).at(0), alone);
    EXPECT_EQ(fallbacks(two.decode, "gone"), 1);
    two.expect_idle();
  }
  Two two(o, kSmall, [](EngineOptions& e) { e.transfer.lease_seconds = 0.3; });
  // The router has given it to the decode side alone.
  expect_equal(two.decode.generate(std::vector{two.in_room(r, 1)}).at(0), alone);
  EXPECT_EQ(fallbacks(two.decode, "late"), 1);
  two.expect_idle();
}

TEST(PeerTest, RequestsAreRefusedWithAReason) {
  EngineOptions o = options();
  Engine one(kSmall, o);
  Request r = request(10);
  r.bootstrap = BootstrapRoom{"127.0.0.1", 8998, 1};
  const auto refused = [](Engine& engine, const Request& asked, const std::string& words) {
    try {
      engine.submit(asked, {});
      ADD_FAILURE() << "taken, expected " << words;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  };
  refused(one, r, "bootstrap_room is 1, expected none: the server has no --role");
  Two two(o);
  refused(two.decode, r, "expected one of --peer");
  r.bootstrap->room = -1;
  refused(two.decode, r, "bootstrap_room is -1, expected 0 or more");
  // A room that another request has, at the prefill side.
  const Request in_room = two.in_room(request(50), 7);
  RequestId id = 0;
  const auto first = submit(two.prefill, in_room, &id);
  const auto second = submit(two.prefill, in_room);
  wait_until([&] { return second->over.load(); });
  EXPECT_EQ(second->finish, FinishReason::kError);
  EXPECT_NE(second->error.find("bootstrap_room is 7, which another request has"), std::string::npos)
      << second->error;
  EXPECT_FALSE(first->over);
  two.prefill.cancel(id);
  wait_until([&] { return first->over.load(); });
  EXPECT_EQ(first->finish, FinishReason::kCancelled);
  two.expect_idle();
}

TEST(PeerTest, OptionsAreCheckedBeforeTheModel) {
  EngineOptions good;
  good.transfer.role = TransferRole::kDecode;
  good.transfer.peers = {"*", "host:1"};
  EXPECT_NO_THROW(check_transfer(good.transfer));
  const std::vector<std::pair<std::function<void(TransferOptions&)>, std::string>> wrong = {
      {[](TransferOptions& t) { t.transport = "pigeons"; }, "transfer.transport is \"pigeons\""},
      {[](TransferOptions& t) { t.port = 65536; }, "transfer.port is 65536"},
      {[](TransferOptions& t) { t.lease_seconds = 0; }, "transfer.lease_seconds is 0"},
      {[](TransferOptions& t) { t.layerwise_tokens = -1; }, "transfer.layerwise_tokens is -1"},
      {[](TransferOptions& t) { t.peers = {}; }, "transfer.peers is empty"},
      {[](TransferOptions& t) { t.peers = {"host"}; }, "transfer.peers has \"host\""},
      {[](TransferOptions& t) { t.role = TransferRole::kPrefill; }, "transfer.peers: expected none"}};
  for (const auto& [change, words] : wrong) {
    EngineOptions o = good;
    change(o.transfer);
    try {
      Engine("no such model", o);
      ADD_FAILURE() << "taken, expected " << words;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  }
}

// Requests of all kinds at once, in caches and memory that are too small for all of them, some cancelled on either side,
// some given to one side alone: each ends, whole answers are what they are alone, and nothing stays behind.
void random_requests(const std::function<void(EngineOptions&)>& change) {
  const char* const asked = std::getenv("FLASH_MLA_TRANSFER_REQUESTS");
  constexpr int kCount = unless_sanitized(40, 8);
  const int count = asked != nullptr ? std::atoi(asked) : kCount;
  EngineOptions o = options();
  o.num_pages = 24;
  o.max_batch_size = 8;
  o.max_tokens_per_step = 192;
  o.transfer.lease_seconds = 1;
  o.transfer.layerwise_tokens = 300;
  Engine one(kSmall, options());
  o.transfer.memory_bytes = 30 * one.stats().bytes_per_page;
  change(o);
  Two two(o);
  std::mt19937 random(1);
  std::map<std::pair<std::size_t, std::size_t>, std::vector<std::int32_t>> alone;
  const auto draw = [&](unsigned below) { return static_cast<unsigned>(random() % below); };
  int whole = 0;
  for (int done = 0; done < count;) {
    struct Running {
      std::shared_ptr<Outcome> prefill, decode;
      std::pair<std::size_t, std::size_t> kind;
    };
    std::vector<Running> running;
    for (int i = 0; i < 20 && done < count; ++i, ++done) {
      const std::size_t length = 1 + draw(draw(2) == 0 ? 200 : 900), seed = draw(5);
      Running r{nullptr, nullptr, {length, seed}};
      const Request in_room = two.in_room(request(length, 4, seed), draw(20) == 0 ? 0 : done);
      const unsigned to = draw(12);  // 0: the prefill side alone, 1: the decode side alone
      RequestId id = 0;
      if (to != 1) {
        r.prefill = submit(two.prefill, in_room, &id);
        if (draw(10) == 0) two.prefill.cancel(id);
      }
      if (to != 0) {
        r.decode = submit(two.decode, in_room, &id);
        if (draw(10) == 0) two.decode.cancel(id);
      }
      running.push_back(std::move(r));
    }
    for (const Running& r : running) {
      for (const auto& side : {r.prefill, r.decode}) {
        if (side) wait_until([&] { return side->over.load(); });
      }
      if (r.prefill) {
        const FinishReason f = r.prefill->finish;
        EXPECT_TRUE(f == FinishReason::kLength || f == FinishReason::kCancelled || !r.prefill->error.empty());
      }
      if (!r.decode || r.decode->finish == FinishReason::kCancelled) continue;
      EXPECT_EQ(r.decode->finish, FinishReason::kLength) << r.decode->error;
      auto& expected = alone[r.kind];
      if (expected.empty()) {
        expected =
            one.generate(std::vector{request(r.kind.first, 4, r.kind.second)}).at(0).choices[0].token_ids;
      }
      EXPECT_EQ(r.decode->tokens, expected) << r.kind.first;
      ++whole;
    }
  }
  EXPECT_GT(whole, count / 2);
  // On a slow machine all leases may have ended before; of one short prompt at a time some does not.
  for (int room = count + 1; two.decode.stats().transfer.handed_over == 0; ++room) {
    ASSERT_LT(room, count + 100) << "nothing is ever handed over";
    const Request in_room = two.in_room(request(20, 4, 1), room);
    for (const auto& side : {submit(two.prefill, in_room), submit(two.decode, in_room)})
      wait_until([&] { return side->over.load(); });
  }
  two.expect_idle();
  // Neither landings, nor the prefill side's ways to them.
  wait_until([] {
    for (const auto& file : fs::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      if (fs::read_symlink(file.path(), gone).string().starts_with("/memfd:flash-mla-")) return false;
    }
    return true;
  });
}

TEST(PeerTest, RandomRequestsLeakNothing) {
  random_requests([](EngineOptions&) {});
}

TEST(PeerTest, RandomRequestsOnRanksWithTiersLeakNothing) {
  const TemporaryDirectory directory;
  random_requests([&](EngineOptions& o) {
    o.dp = 2;
    o.num_threads = 2;
    // Too small for all chunks; both sides share the directory.
    o.kv_tiers = {"ram:6MiB", "file:" + directory.path().string() + ",12MiB"};
  });
}

}  // namespace
}  // namespace flash_mla
