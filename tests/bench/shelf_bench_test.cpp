// The benchmark of attention and its neighbours: presets, floors, the table and the result file. What it measures needs a GPU.

#include "bench/shelf_bench.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "bench/shelf_case.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

constexpr Rates kRates{4650, 4260, 758};

ShelfCase call_named(const std::string& name) {
  for (const ShelfCase& c : read_shelf_preset("h200-shelf")) {
    if (c.name == name) return c;
  }
  throw std::runtime_error("no call " + name);
}

TEST(ShelfPreset, FlopBytesAndFloors) {
  ASSERT_TRUE(is_shelf_preset("h200-shelf"));
  ASSERT_FALSE(is_shelf_preset("h200-sparse"));
  const ShelfCase causal = call_named("mla_prefill b1 q1024 k1024 h128 causal");
  EXPECT_DOUBLE_EQ(causal.flop(), 2.0 * 128 * (1024.0 * 1025 / 2) * 320);
  EXPECT_DOUBLE_EQ(call_named("mla_prefill b1 q1024 k1024 h128 full").flop(), 2.0 * 128 * 1024 * 1024 * 320);
  // A chunk sees all of the prefix and half of itself.
  const ShelfCase chunk = call_named("mla_prefill b1 q128 k32768 h16 causal");
  EXPECT_DOUBLE_EQ(chunk.flop(), 2.0 * 16 * (128.0 * (32768 - 128) + 128.0 * 129 / 2) * 320);
  EXPECT_DOUBLE_EQ(chunk.bytes(), 2.0 * 128 * 16 * 320 + 2.0 * 32768 * (2 * 16 * 128 + 64));
  const ShelfCase decode = call_named("gqa_attention b128 q1 k8192 h32/8 d128 page64");
  EXPECT_DOUBLE_EQ(decode.bytes(), 4.0 * 128 * 8192 * 8 * 128 + 4.0 * 128 * 32 * 128);
  EXPECT_NEAR(decode.floor_us(kRates), 924.1, 0.1);
  EXPECT_NEAR(causal.floor_us(kRates), causal.flop() / 758e6, 1e-9);
  EXPECT_NEAR(causal.floor_us({4650, 4260, 0}), causal.bytes() / 4650e3, 1e-9) << "without a product's rate";
  EXPECT_DOUBLE_EQ(call_named("append_pages n4096 h8 d128").bytes(), 4096.0 * (8 * 8 * 128 + 8));
  EXPECT_DOUBLE_EQ(call_named("append_kv n32 bfloat16").bytes(), 32.0 * (4 * 576 + 8));
  EXPECT_DOUBLE_EQ(call_named("rms_norm n4096 d7168").bytes(), 2.0 * 7168 * (2 * 4096 + 1));
  EXPECT_DOUBLE_EQ(call_named("add_rms_norm n32 d7168").bytes(), 2.0 * 7168 * (4 * 32 + 1));
  EXPECT_DOUBLE_EQ(call_named("apply_rope n32 h40 d128").bytes(), 32.0 * (4 * 40 * 128 + 4));
  EXPECT_DOUBLE_EQ(call_named("choose_experts n32 8 of 256").floor_us(kRates),
                   (32.0 * (4 * 256 + 8 * 8) + 4 * 256) / 4260e3);
}

std::string error_of(const std::string& text) {
  const std::string path = ::testing::TempDir() + "shelf_preset_test.json";
  std::ofstream(path) << text;
  try {
    read_shelf_preset(path);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(ShelfPreset, ErrorsNameTheKeyAndItsValue) {
  const auto with = [](const std::string& calls) { return R"({"device": "cuda", "calls": )" + calls + "}"; };
  EXPECT_EQ(error_of(with("[{}]")), "");
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(error_of(text).find(part), std::string::npos) << error_of(text) << "\nwithout " << part;
  };
  expect("{}", "a non-empty array \"calls\"");
  expect(with("[]"), "a non-empty array \"calls\"");
  expect(R"({"calls": [{}]})", "\"device\" is missing, expected \"cuda\"");
  expect(with(R"([{}, {"s_kv": 1}])"), "calls[1]: unknown key \"s_kv\"");
  expect(with(R"([{"operation": "decode"}])"),
         "\"operation\" is \"decode\", expected one of: mla_prefill, gqa_attention, ");
  expect(with(R"([{"s_q": 4096, "s_k": 1024}])"), "\"s_k\" is 1024, expected at least \"s_q\", 4096");
  expect(with(R"([{"h_q": 12}])"), "\"h_q\" is 12, expected a multiple of \"h_kv\", 8");
  expect(with("[{}, {}]"), "calls[1]: another call is \"gqa_attention b1 q1 k1024 h32/8 d128\"");
}

gpu::ShelfRow measured_row() {
  gpu::ShelfRow row;
  row.shape.name = "a call";
  row.shape.operation = ShelfOperation::kRmsNorm;
  row.shape.d = 7168;
  row.us = 33;
  row.copy_us = 30;
  row.correct = true;
  return row;
}

TEST(ShelfReport, ComparesWithFloorAndCopy) {
  const gpu::ShelfRow row = measured_row();
  const nlohmann::ordered_json json = shelf_json(row, kRates);
  const double floor = 2.0 * 7168 * (2 * 4096 + 1) / 4260e3;
  EXPECT_DOUBLE_EQ(json["floor_us"], floor);
  EXPECT_DOUBLE_EQ(json["over_floor"], 33 / floor);
  EXPECT_DOUBLE_EQ(json["over_copy"], 1.1);
  EXPECT_TRUE(json["tflops"].is_null());
  EXPECT_TRUE(json["graph_us"].is_null());
  const std::string table = shelf_table({row}, kRates);
  EXPECT_NE(table.find("a call  33.00     27.57        1.20       1.10        -  3559"), std::string::npos)
      << table;
}

TEST(ShelfReport, SaysWhatIsWrongAndWhatIsNotInTheBuild) {
  gpu::ShelfRow wrong = measured_row(), missing = measured_row();
  wrong.correct = false;
  wrong.failure = "element 3 of out is 1, expected 2, the CPU's";
  missing.shape.name = "another call";
  missing.not_in_build = "append_pages has no sm90 backend";
  const std::string table = shelf_table({wrong, missing}, kRates);
  EXPECT_NE(table.find("WRONG: a call: element 3 of out is 1, expected 2, the CPU's\n"), std::string::npos);
  EXPECT_NE(table.find("no kernel in this build: another call: append_pages has no sm90 backend\n"),
            std::string::npos);
  EXPECT_EQ(shelf_json(missing, kRates)["measured"], false);
  EXPECT_FALSE(shelf_json(missing, kRates).contains("us"));
  EXPECT_EQ(shelf_json(wrong, kRates)["correct"], false);
}

}  // namespace
}  // namespace flash_mla::bench
