// What an engine says of its experts, and the formulas over it.

#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

#include "engine/engine_core.h"
#include "fake_model.h"
#include "flash_mla/engine.h"
#include "flash_mla/error.h"

namespace flash_mla {
namespace {

TEST(ExpertBalance, IsMeanOverMaxOfEachLayerAddedUp) {
  const ExpertCounts first{3, {10, 30, 0, 20}, {40, 20}}, second{4, {5, 5, 5, 25}, {10, 30}};
  EXPECT_EQ(first.total(), 60);
  EXPECT_EQ(first.hottest(), 1);
  EXPECT_DOUBLE_EQ(first.hottest_share(), 0.5);
  EXPECT_DOUBLE_EQ(balancedness(first.counts), 15. / 30);
  EXPECT_DOUBLE_EQ(balancedness(first.rank_counts), 30. / 40);
  const std::vector<ExpertCounts> both = {first, second};
  EXPECT_DOUBLE_EQ(balance_of(both).experts, (15. + 10) / (30 + 25));
  EXPECT_DOUBLE_EQ(balance_of(both).ranks, (30. + 20) / (40 + 30));
}

TEST(ExpertBalance, OfNothingIsEven) {
  const ExpertCounts idle{3, {0, 0, 0}, {0}};
  EXPECT_EQ(idle.hottest_share(), 0);
  EXPECT_EQ(balancedness(idle.counts), 1);
  EXPECT_EQ(balancedness({}), 1);
  EXPECT_EQ(balance_of({}).experts, 1);
}

EngineOptions options() {
  EngineOptions o;
  o.device = EngineOptions::Device::kCpu;
  o.num_pages = 16;
  o.max_tokens_per_step = 128;
  o.num_threads = 1;
  return o;
}

TEST(EngineExperts, AreCountedForEveryTokenWhileOthersLook) {
  Engine engine(FLASH_MLA_SMALL_MODEL, options());
  EXPECT_EQ(engine.expert_counts().at(0).total(), 0);
  std::jthread reader([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) EXPECT_EQ(engine.expert_counts().size(), 4u);
  });
  std::vector<Request> requests(6);
  for (Request& request : requests) {
    request.prompt = "And it came to pass in those days, that there went out a decree";
    request.sampling.max_tokens = 20;
    request.sampling.ignore_eos = true;
    request.sampling.temperature = 0;
  }
  engine.generate(requests);
  reader.request_stop();
  reader.join();
  const EngineStats stats = engine.stats();
  ASSERT_EQ(stats.experts.size(), 4u);  // of five layers, the first dense
  for (const ExpertCounts& layer : stats.experts) {
    ASSERT_EQ(layer.counts.size(), 8u);
    EXPECT_EQ(layer.rank_counts, std::vector<std::int64_t>{layer.total()});
    // The last layer leaves out a prompt's tokens.
    EXPECT_EQ(layer.total() == 2 * stats.computed_tokens, layer.layer < 4) << layer.total();
    EXPECT_GT(layer.total(), 0);
    EXPECT_GE(layer.hottest_share(), 1. / 8);
  }
}

TEST(EngineExperts, AModelWithoutThemIsRefused) {
  engine::EngineCore core(std::make_unique<engine::FakeModel>(), {}, {}, options());
  EXPECT_TRUE(core.stats().experts.empty());
  EXPECT_THROW(core.expert_counts(), Unsupported);
}

}  // namespace
}  // namespace flash_mla
