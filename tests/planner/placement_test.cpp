#include "planner/placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla::planner {
namespace {

using Loads = std::vector<double>;
using Slots = std::vector<std::int64_t>;

// The example of EPLB's README: two layers of 12 experts in 4 groups, 16 slots on 8 GPUs of 2 hosts.
const Loads kFirst = {90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86};
const Loads kSecond = {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27};
const PlacementOptions kExample = {"eplb", 8, 4, 2, 4};

TEST(Placement, AgreesWithThePublishedExample) {
  EXPECT_EQ(place_experts(kFirst, kExample).slots,
            (Slots{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
  EXPECT_EQ(place_experts(kSecond, kExample).slots,
            (Slots{7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}));
}

TEST(Placement, LinearAndRoundRobin) {
  const Loads load = {8, 0, 0, 0, 4, 0};
  const LayerPlacement linear = place_experts(load, {"linear", 3}),
                       round = place_experts(load, {"round_robin", 3});
  EXPECT_EQ(linear.slots, (Slots{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(round.slots, (Slots{0, 3, 1, 4, 2, 5}));
  for (const LayerPlacement& p : {linear, round}) {
    EXPECT_DOUBLE_EQ(p.busiest_share, 8.0 / 12);
    EXPECT_DOUBLE_EQ(p.balancedness, 0.5);
  }
}

TEST(Placement, CopiesTakeLoadOffTheBusiest) {
  const Loads load = {100, 10, 10, 10};
  EXPECT_DOUBLE_EQ(place_experts(load, {"eplb", 4}).busiest_share, 100.0 / 130);
  const LayerPlacement copied = place_experts(load, {"eplb", 4, 4});
  EXPECT_EQ(std::ranges::count(copied.slots, 0), 5);
  EXPECT_DOUBLE_EQ(copied.busiest_share, 40.0 / 130);  // two of five copies, 20 each
  EXPECT_NEAR(place_experts(load, {"eplb", 1}).balancedness, 1, 1e-12);
  EXPECT_EQ(place_experts(Loads(8, 0), {"eplb", 4, 4}).balancedness, 1);
}

// Whatever the loads: as many slots on each GPU, every expert somewhere, groups on one host, and no worse than in order.
TEST(Placement, HoldsItsPromisesForRandomLoads) {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    const std::int64_t groups = 1 << random() % 4, nodes = 1 << random() % 3, gpus = nodes << random() % 3;
    const std::int64_t experts = 32;
    const auto copies = static_cast<std::int64_t>(gpus * (random() % 3));
    Loads load;
    for (std::int64_t e = 0; e < experts; ++e)
      load.push_back(std::exp2(static_cast<double>(random() % 1000) / 100));
    const LayerPlacement p = place_experts(load, {"eplb", gpus, copies, nodes, groups});
    ASSERT_EQ(std::ssize(p.slots), experts + copies);
    std::map<std::int64_t, int> node_of_group;
    Slots seen(32, 0);
    for (std::int64_t i = 0; i < std::ssize(p.slots); ++i) {
      const std::int64_t e = p.slots[static_cast<std::size_t>(i)];
      ++seen[static_cast<std::size_t>(e)];
      const auto node = static_cast<int>(i / (std::ssize(p.slots) / nodes));
      if (groups % nodes == 0) {
        ASSERT_EQ(node_of_group.emplace(e / (experts / groups), node).first->second, node);
      }
    }
    EXPECT_EQ(std::ranges::count(seen, 0), 0);
    EXPECT_GT(p.balancedness, 0);
    EXPECT_LE(p.balancedness, 1 + 1e-12);
    EXPECT_NEAR(p.balancedness * p.busiest_share * static_cast<double>(gpus), 1, 1e-9);
    if (nodes == 1) {
      EXPECT_GE(p.balancedness, 0.9 * place_experts(load, {"linear", gpus}).balancedness);
    }
  }
}

void expect_refused(const Loads& load, const PlacementOptions& o, const std::string& message) {
  try {
    place_experts(load, o);
    ADD_FAILURE() << message;
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
  }
}

TEST(Placement, RefusesWhatDoesNotDivide) {
  const Loads load(12, 1);
  expect_refused({}, {"eplb", 1}, "counts");
  expect_refused({1, -1}, {"eplb", 1}, "counts");
  expect_refused({1, std::numeric_limits<double>::quiet_NaN()}, {"eplb", 1}, "counts");
  expect_refused(load, {"best", 4}, "placement");
  expect_refused(load, {"eplb", 5}, "gpus");
  expect_refused(load, {"eplb", 0}, "gpus");
  expect_refused(load, {"eplb", 8, 3}, "gpus");
  expect_refused(load, {"linear", 4, 4}, "copies");
  expect_refused(load, {"eplb", 4, -4}, "copies");
  expect_refused(load, {"eplb", 4, 0, 3}, "nodes");
  expect_refused(load, {"eplb", 4, 0, 1, 5}, "groups");
}

TEST(Histogram, IsReadAndPlanned) {
  const std::string text =
      R"({"layers": [{"layer": 1, "counts": [4, 0, 0, 0]}, {"layer": 2, "counts": [1, 1, 1, 1]}]})";
  const std::vector<LayerLoad> layers = read_histogram(text, "a file");
  ASSERT_EQ(layers.size(), 2U);
  EXPECT_EQ(layers[0].load, (Loads{4, 0, 0, 0}));
  const std::string plan = plan_placement(layers, {"eplb", 2, 2});
  const auto json = nlohmann::json::parse(plan);
  EXPECT_EQ(json["gpus"], 2);
  EXPECT_EQ(json["layers"][0]["layer"], 1);
  EXPECT_EQ(json["layers"][0]["balancedness"], 0.75);
  EXPECT_EQ(json["layers"][0]["linear_balancedness"], 0.5);
  // A plan is a histogram, too.
  EXPECT_EQ(read_histogram(plan, "a plan")[1].load, layers[1].load);
  for (const char* wrong : {"", "[]", "{}", R"({"layers": []})", R"({"layers": [{"counts": [1]}]})",
                            R"({"layers": [{"layer": 1}]})", R"({"layers": [{"layer": 1, "counts": []}]})",
                            R"({"layers": [{"layer": 1, "counts": [1, "x"]}]})",
                            R"({"layers": [{"layer": 1, "counts": [1, 2]}, {"layer": 2, "counts": [1]}]})"}) {
    EXPECT_THROW(read_histogram(wrong, "a file"), InvalidArgument) << wrong;
  }
}

}  // namespace
}  // namespace flash_mla::planner
