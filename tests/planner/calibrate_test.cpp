#include "planner/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "requests.h"

namespace flash_mla::planner {
namespace {

std::vector<BenchRow> synthetic(const Hardware& h, const Efficiency& truth) {
  std::vector<BenchRow> rows;
  for (const std::int64_t b : {1, 8, 64}) {
    for (const std::int64_t h_q : {16, 128}) {
      for (const std::int64_t s_k : {1024, 16384}) {
        BenchRow row{b, 1, h_q, 1, s_k, "bf16", 0};
        row.ms = 1e3 * predict_attention(row, h, truth);
        rows.push_back(row);
      }
    }
  }
  return rows;
}

TEST(Calibrate, RecoversKnownEfficiencies) {
  const Hardware h = find_hardware("h200", "hardware");
  Efficiency truth;
  truth.attention_compute = 0.62;
  truth.attention_memory = 0.87;
  truth.attention_launch_s = 7e-6;
  const Efficiency fit = fit_attention(synthetic(h, truth), h);
  EXPECT_NEAR(fit.attention_compute, 0.62, 2e-3);
  EXPECT_NEAR(fit.attention_memory, 0.87, 2e-3);
  EXPECT_NEAR(fit.attention_launch_s, 7e-6, 5e-8);
}

TEST(Calibrate, WorkOfARow) {
  const BenchRow row{128, 2, 128, 1, 4096, "bf16", 1};
  EXPECT_EQ(attention_flop(row), 2.0 * 128 * 2 * 128 * 4096 * 1088);
  EXPECT_EQ(attention_bytes(row), 128.0 * 4096 * 1152 + 2.0 * 128 * 2 * 128 * 1088);
}

TEST(Calibrate, ProfilePredictsWithTheMeasuredFractions) {
  const Json out = run_calibrate(parse_json(R"({"hardware": "h200", "bench": "h200_dense_decode"})", "test"));
  EXPECT_EQ(out["rows"].size(), 59u);
  const double at_peak = out["summary"]["at_peak"]["median_abs_error"].get<double>();
  const double held_out = out["summary"]["held_out"]["median_abs_error"].get<double>();
  EXPECT_LT(held_out, 0.15);
  EXPECT_LT(held_out, at_peak / 3);

  // The profile reads back, and its fractions lengthen exactly the attention.
  const Hardware measured = read_hardware(out["profile"], "test");
  Request q = parse(R"({"hardware": "h200", "plan": {"ep": 16}})");
  const Result peak = evaluate(q);
  q.hardware = measured;
  const Result real = evaluate(q);
  EXPECT_GT(real.decode.compute_s, peak.decode.compute_s);
  const Operator &before = peak.decode.operators[0], &after = real.decode.operators[0];
  ASSERT_EQ(after.name, "attention");
  EXPECT_NEAR(after.compute_s, before.compute_s / measured.efficiency.attention_compute, 1e-12);
  EXPECT_NEAR(after.memory_s, before.memory_s / measured.efficiency.attention_memory, 1e-12);
  EXPECT_NEAR(real.decode.serial_s - peak.decode.serial_s,
              after.compute_s + after.memory_s - before.compute_s - before.memory_s +
                  61 * measured.efficiency.attention_launch_s,
              1e-9);
}

TEST(Calibrate, BadRowsAreNamed) {
  auto fails = [](const char* bench, const char* part) {
    Json request = {{"hardware", "h200"}};
    request["bench"] = parse_json(bench, "test");
    try {
      run_calibrate(request);
      ADD_FAILURE() << bench;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  fails(R"({"rows": []})", "rows");
  fails(R"({})", "rows = (missing)");
  fails(R"({"rows": [{"b": 0, "s_q": 1, "h_q": 16, "s_k": 64, "ms": 1}]})", "rows[0].b = 0");
  fails(R"({"rows": [{"b": 1, "s_q": 1, "h_q": 16, "s_k": 64}]})", "rows[0].ms = (missing)");
  fails(R"({"rows": [{"b": 1, "s_q": 1, "h_q": 16, "s_k": 64, "ms": -1}]})", "rows[0].ms = -1");
  fails(R"({"rows": [{"b": 1, "s_q": 1, "h_q": 16, "s_k": 64, "ms": 1}]})", "at least 3");
}

}  // namespace
}  // namespace flash_mla::planner
