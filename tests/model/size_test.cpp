#include "model/size.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/json.h"
#include "checkpoint/config.h"
#include "flash_mla/error.h"
#include "flash_mla/planner.h"
#include "temporary_directory.h"

namespace flash_mla::model {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr double kGiB = 1 << 30;

checkpoint::ModelConfig v2_lite() {
  const std::string path = std::string(FLASH_MLA_MODELS) + "/deepseek-v2-lite.json";
  return checkpoint::parse_config(read_file(path), path);
}

TEST(Size, WeightsOfTheLayersAddUp) {
  const checkpoint::ModelConfig c = v2_lite();
  const double embedding = double{1} * c.vocab_size * c.hidden_size;
  EXPECT_EQ(num_weights_before(c, 0), embedding);
  EXPECT_GT(num_weights_before(c, 2), num_weights_before(c, 1));
  EXPECT_EQ(num_weights(c), num_weights_before(c, c.num_hidden_layers) + embedding);
  EXPECT_NEAR(num_weights(c), 15.7e9, 0.1e9);
}

TEST(Size, WhatDoesNotFitADeviceIsRefusedWithItsSizes) {
  const checkpoint::ModelConfig c = v2_lite();  // 29.2 GiB in bfloat16
  const auto refused = [&](int pages, double bytes, double free) {
    return message_of<OutOfMemory>([&] {
      check_fits_device(c, pages, bytes, false, {free * kGiB, 80 * kGiB});
    });
  };
  EXPECT_THAT(refused(0, 0, 20), AllOf(HasSubstr("15.7 billion weights in bfloat16 are 29.2 GiB"),
                                       HasSubstr("a cache of one page 0.0 GiB"),
                                       HasSubstr("of 80.0 GiB there are 20.0 GiB free")));
  // A page: 64 tokens of 576 values of 2 bytes in 27 layers.
  EXPECT_EQ(page_bytes(c, false), 64.0 * 576 * 2 * 27);
  EXPECT_THAT(refused(10'000, 0, 40), HasSubstr("the cache that is asked for 18.5 GiB"));
  EXPECT_THAT(refused(0, 12 * kGiB, 40), HasSubstr("the cache that is asked for 12.0 GiB"));
  check_fits_device(c, 0, 0, false, {30 * kGiB, 80 * kGiB});
  check_fits_device(c, 10'000, 0, false, {50 * kGiB, 80 * kGiB});
}

TEST(Size, OfQuantisedWeights) {
  checkpoint::ModelConfig c = v2_lite();
  const double all = num_weights(c), wide = weight_bytes(c, DType::kBFloat16, ModelQuantize::kNone);
  EXPECT_EQ(wide, 2 * all);
  EXPECT_EQ(weight_bytes(c, DType::kFloat32, ModelQuantize::kNone), 4 * all);
  // 14.4 of 15.7 billion are routed experts', 0.45 shared ones'.
  EXPECT_NEAR(weight_bytes(c, DType::kBFloat16, ModelQuantize::kW4A8), wide - 14.845e9 * (2 - 0.53125), 1e7);
  EXPECT_NEAR(weight_bytes(c, DType::kBFloat16, ModelQuantize::kFp8) / all, 1.065, 0.005);
  // Embedding and kv_b stay wide.
  EXPECT_NEAR(weight_bytes(c, DType::kBFloat16, ModelQuantize::kInt8), 1.02 * all, 0.01 * all);
  c.stored = {128, 128, 0};
  EXPECT_NEAR(weight_bytes(c, DType::kBFloat16, ModelQuantize::kNone) / all, 1.061, 0.005);
  c.stored = {0, 0, 128};
  EXPECT_NEAR(weight_bytes(c, DType::kBFloat16, ModelQuantize::kNone) / all, 0.58, 0.02);
}

TEST(Size, OnADevice) {
  checkpoint::ModelConfig c = v2_lite();
  const double all = num_weights(c);
  EXPECT_EQ(device_weight_bytes(c, ModelQuantize::kNone), 2 * all);
  // Without the 128-fold scales of the CPU's rows.
  const double fp8 = device_weight_bytes(c, ModelQuantize::kFp8);
  EXPECT_LT(fp8, weight_bytes(c, DType::kBFloat16, ModelQuantize::kFp8));
  EXPECT_NEAR(fp8 / all, 1.038, 0.005);
  c.stored = {128, 128, 0};
  EXPECT_NEAR(device_weight_bytes(c, ModelQuantize::kNone) / all, 1.034, 0.005);
  const auto refused = [&](double free) {
    return message_of<OutOfMemory>([&] { check_fits_device(c, 0, 0, false, {free * kGiB, 80 * kGiB}); });
  };
  EXPECT_THAT(refused(12), HasSubstr("15.7 billion weights of 1.03 bytes are 15.1 GiB"));
  check_fits_device(c, 0, 0, false, {16 * kGiB, 80 * kGiB});
  // Of other blocks, and of 4 bits in other groups, nothing is kept.
  for (const checkpoint::StoredFormat& stored :
       {checkpoint::StoredFormat{4, 128, 0}, checkpoint::StoredFormat{128, 64, 0},
        checkpoint::StoredFormat{0, 0, 32}}) {
    c.stored = stored;
    EXPECT_EQ(device_weight_bytes(c, ModelQuantize::kNone), 2 * all);
  }
  // Experts in 4 bits, stored so or made so.
  c.stored = {};
  const double int4 = device_weight_bytes(c, ModelQuantize::kW4A8);
  EXPECT_NEAR(int4, 2 * all - 14.845e9 * (2 - 0.53125), 1e7);
  for (const int group : {128, 256, -1}) {
    c.stored = {0, 0, group};
    EXPECT_EQ(device_weight_bytes(c, ModelQuantize::kNone), int4);
  }
}

/// And in fewer bits, but for what the engine keeps wide.
TEST(Size, IsThePlannersInFewerBits) {
  for (const std::string name : {"deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-v3.2"}) {
    SCOPED_TRACE(name);
    const std::string path = std::string(FLASH_MLA_MODELS) + "/" + name + ".json";
    checkpoint::ModelConfig c = checkpoint::parse_config(read_file(path), path);
    const auto planned = [&](const Json& precision) {
      const Json request = {
          {"model", name}, {"hardware", "h200"}, {"precision", precision}, {"plan", {{"tp", 1}, {"ep", 1}}}};
      const Json resident = Json::parse(planner::run_json(request.dump()))["decode"]["resident_bytes"];
      return resident["dense_weights"].get<double>() + resident["shared_experts"].get<double>() +
             resident["routed_experts"].get<double>();
    };
    c.stored = {};
    const double int4 = device_weight_bytes(c, ModelQuantize::kW4A8);
    EXPECT_NEAR(planned({{"dense", "bf16"}, {"moe", "w4a8"}, {"scale_group", 64}}) / int4, 1, 1e-3);
    c.stored = {128, 128, 0};
    const double wide = c.vocab_size * 2.0 * c.hidden_size + double{1} * c.num_hidden_layers *
                                                                 c.num_attention_heads * c.kv_lora_rank *
                                                                 (c.qk_nope_head_dim + c.v_head_dim);
    const double fp8 = device_weight_bytes(c, ModelQuantize::kNone);
    EXPECT_NEAR((planned({{"dense", "fp8"}, {"moe", "fp8"}}) + wide) / fp8, 1, 0.005);
  }
}

TEST(Size, TheModuleCounts) {
  checkpoint::ModelConfig c = v2_lite();
  // A layer's attention and experts, and two hidden states to one.
  const double expert = 3 * 2048 * 1408;
  const double module =
      2048 * 16 * 192 + 576 * 2048 + 16 * 512 * 256 + 2048 * 2048 + 66 * expert + 2 * 2048 * 2048;
  EXPECT_EQ(num_module_weights(c), module);
  EXPECT_EQ(device_weight_bytes(c, ModelQuantize::kNone, true), 2 * (num_weights(c) + module));
  EXPECT_NEAR(
      device_weight_bytes(c, ModelQuantize::kW4A8, true) - device_weight_bytes(c, ModelQuantize::kW4A8),
      2 * (module - 66 * expert) + 0.53125 * 66 * expert, 1);
  EXPECT_EQ(page_bytes(c, false, true), page_bytes(c, false) / 27 * 28);
  const DeviceMemory memory{2 * num_weights(c) + module, 80 * kGiB};
  check_fits_device(c, 0, 0, false, memory);
  EXPECT_THAT(
      message_of<OutOfMemory>([&] { check_fits_device(c, 0, 0, false, memory, ModelQuantize::kNone, true); }),
      HasSubstr("16.3 billion weights in bfloat16"));
}

/// The planner counts what the engine counts, to the norms and biases.
TEST(Size, IsThePlanners) {
  for (const std::string name :
       {"deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "deepseek-v3.2", "glm-5", "kimi-k2"}) {
    SCOPED_TRACE(name);
    const std::string path = std::string(FLASH_MLA_MODELS) + "/" + name + ".json";
    const checkpoint::ModelConfig c = checkpoint::parse_config(read_file(path), path);
    const Json request = {{"model", name},
                          {"hardware", "h200"},
                          {"precision", {{"dense", "bf16"}, {"moe", "bf16"}}},
                          {"plan", {{"tp", 1}, {"ep", 1}}}};
    const Json result = Json::parse(planner::run_json(request.dump()));
    double resident = 0;
    for (const auto& [kind, bytes] : result["decode"]["resident_bytes"].items()) {
      if (kind == "dense_weights" || kind == "shared_experts" || kind == "routed_experts")
        resident += bytes.get<double>();
    }
    EXPECT_NEAR(resident / (2 * num_weights(c)), 1, 1e-3);
  }
}

}  // namespace
}  // namespace flash_mla::model
