// The benchmark of sparse attention and FP8 caches: presets, floors, the table and the result file. What it measures needs
// a GPU.

#include "bench/sparse_bench.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "bench/sparse_case.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

constexpr Rates kRates{4650, 4260, 758};

const SparseCase& case_named(const SparsePreset& preset, const std::string& name) {
  for (const SparseCase& c : preset.cases) {
    if (c.name == name) return c;
  }
  throw std::runtime_error("no case " + name);
}

TEST(SparsePreset, H200SparseHasTheFloorsOfTheReference) {
  ASSERT_TRUE(is_sparse_preset("h200-sparse"));
  ASSERT_FALSE(is_sparse_preset("h200-dense"));
  const SparsePreset preset = read_sparse_preset("h200-sparse");
  const auto floor = [&](const std::string& name) { return case_named(preset, name).floor_us(preset.rates); };
  EXPECT_NEAR(floor("sparse_decode b128 s_q1 h128 topk2048 fp8_v32"), 96.3, 0.1);
  EXPECT_NEAR(floor("sparse_decode b128 s_q2 h128 topk2048 fp8_v32"), 192.7, 0.1);
  EXPECT_NEAR(floor("sparse_decode b128 s_q1 h64 topk2048 fp8_v32"), 48.2, 0.1);
  EXPECT_NEAR(floor("sparse_decode b128 s_q1 h16 topk2048 fp8_v32"), 38.2, 0.1);  // memory
  EXPECT_NEAR(floor("sparse_decode b2 s_q1 h128 topk2048 fp8_v32"), 1.5, 0.05);
  EXPECT_NEAR(floor("sparse_decode b128 s_q1 h64 topk128+512 fp8_v4"), 14.2, 0.1);
  EXPECT_NEAR(floor("sparse_decode b128 s_q1 h128 topk128+1024 fp8_v4"), 51.0, 0.1);
  EXPECT_NEAR(floor("sparse_prefill b1 s_q4096 h128 topk2048 s_kv131072 bfloat16"), 3082, 1);
  EXPECT_NEAR(floor("dense_fp8_decode b128 s_q1 h16 s_kv8192 fp8_v32"), 149, 1);
  EXPECT_NEAR(floor("dense_fp8_decode b128 s_q1 h64 s_kv8192 fp8_v32"), 193, 0.5);
  EXPECT_NEAR(floor("dense_fp8_decode b128 s_q1 h128 s_kv8192 fp8_v32"), 385, 0.5);
  EXPECT_NEAR(floor("merge_states b128 s_q1 h128"), 3 * 128 * 128 * 1028 / 4260e3, 1e-3);
  EXPECT_NEAR(floor("append_kv n4096 fp8_v32"), 4096 * (1152 + 16 + 256 + 656) / 4260e3, 1e-3);
  const SparseCase& padded = case_named(preset, "sparse_decode b128 s_q1 h16 topk2048 fp8_v32");
  EXPECT_EQ(padded.best_us(), 115.73);
  EXPECT_EQ(padded.resolve_us, 60);
  EXPECT_EQ(padded.goal_us, 50);
  EXPECT_FALSE(case_named(preset, "merge_states b128 s_q1 h128").best_us().has_value());
}

TEST(SparsePreset, NamesAreDistinct) {
  std::set<std::string> names;
  const SparsePreset preset = read_sparse_preset("h200-sparse");
  for (const SparseCase& c : preset.cases) names.insert(c.name);
  EXPECT_EQ(names.size(), preset.cases.size());
}

std::string error_of(const std::string& text) {
  const std::string path = ::testing::TempDir() + "sparse_preset_test.json";
  std::ofstream(path) << text;
  try {
    read_sparse_preset(path);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST(SparsePreset, ErrorsNameTheKeyAndItsValue) {
  const auto with = [](const std::string& cases) {
    return R"({"device": "cuda", "rates": {"read_gbps": 1, "copy_gbps": 1, "mma_tflops": 1}, "cases": )" +
           cases + "}";
  };
  EXPECT_EQ(error_of(with("[{}]")), "");
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(error_of(text).find(part), std::string::npos) << error_of(text) << "\nwithout " << part;
  };
  expect("{", "not JSON");
  expect("{}", "a non-empty array \"cases\"");
  expect(with("[]"), "a non-empty array \"cases\"");
  expect(R"({"cases": [{}]})", "\"device\" is missing, expected \"cuda\"");
  expect(R"({"device": "cpu", "cases": [{}]})", "\"device\" is \"cpu\", expected \"cuda\"");
  expect(R"({"device": "cuda", "cases": [{}]})", "rates: \"read_gbps\" is missing");
  expect(R"({"device": "cuda", "rates": {"read_gbps": 0}, "cases": [{}]})",
         "\"read_gbps\" is 0, expected a pos");
  expect(with(R"([{}, {"s_k": 1}])"), "cases[1]: unknown key \"s_k\"");
  expect(with(R"([{"operation": "decode"}])"),
         "\"operation\" is \"decode\", expected one of: sparse_decode, ");
  expect(with(R"([{"format": "float16"}])"),
         "\"format\" is \"float16\", expected one of: bfloat16, fp8_v32, fp8_v4, fp8_tensor");
  expect(with(R"([{"topk": 40000}])"), "\"topk\" is 40000, expected an integer from 1 to 32768");
  expect(with(R"([{"operation": "append_kv", "s_q": 99, "s_kv": 98, "topk": 1}])"),
         "expected at least the 99 tokens");
  expect(with(R"([{"goal_us": -1}])"), "\"goal_us\" is -1");
}

gpu::SparseRow measured_row() {
  gpu::SparseRow row;
  row.shape.name = "a case";
  row.shape.operation = SparseOperation::kMerge;
  row.shape.b = 128;
  row.shape.peers_us = {{"one", 30.0}, {"other", 20.0}};
  row.shape.goal_us = 13;
  row.us = 15;
  row.graph_us = 14;
  row.copy_us = 12;
  row.correct = true;
  return row;
}

TEST(SparseReport, ComparesWithFloorCopyAndPeers) {
  const gpu::SparseRow row = measured_row();
  const nlohmann::ordered_json json = sparse_json(row, kRates);
  const double floor = 3 * 128 * 128 * 1028 / 4260e3;
  EXPECT_DOUBLE_EQ(json["floor_us"], floor);
  EXPECT_DOUBLE_EQ(json["over_floor"], 15 / floor);
  EXPECT_DOUBLE_EQ(json["over_copy"], 15.0 / 12);
  EXPECT_DOUBLE_EQ(json["over_best"], 15.0 / 20);
  EXPECT_EQ(json["measured"], true);
  EXPECT_TRUE(json["host_us"].is_null());
  EXPECT_TRUE(json["resolve_us"].is_null());
  const std::string table = sparse_table({row}, kRates);
  EXPECT_NE(table.find("a case  15.00     11.86        1.26       1.25"), std::string::npos) << table;
  EXPECT_EQ(table.find("WRONG"), std::string::npos);
}

TEST(SparseReport, SaysWhatIsWrongAndWhatIsNotInTheBuild) {
  gpu::SparseRow wrong = measured_row(), missing = measured_row();
  wrong.correct = false;
  wrong.failure = "element 3 is 1, expected 2";
  missing.shape.name = "another case";
  missing.not_in_build = "sparse_prefill has no sm90 backend yet";
  const std::string table = sparse_table({wrong, missing}, kRates);
  EXPECT_NE(table.find("WRONG: a case: element 3 is 1, expected 2\n"), std::string::npos) << table;
  EXPECT_NE(table.find("no kernel in this build: another case: sparse_prefill has no sm90 backend yet\n"),
            std::string::npos)
      << table;
  const nlohmann::ordered_json json = sparse_json(missing, kRates);
  EXPECT_EQ(json["measured"], false);
  EXPECT_FALSE(json.contains("us")) << "nothing was measured";
  EXPECT_EQ(json["not_in_build"], missing.not_in_build);
  EXPECT_EQ(sparse_json(wrong, kRates)["correct"], false);
}

}  // namespace
}  // namespace flash_mla::bench
