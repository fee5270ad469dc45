#include "planner/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "planner/engine_step.h"
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

/// A result of bench-engine whose times follow `costs`.
Json engine_bench(const EngineCosts& costs, const std::string& weights) {
  Json out = {{"model", "deepseek-v2-lite"}, {"weights", weights}, {"cache", "bf16"}};
  Request q = parse(R"({"model": "deepseek-v2-lite", "hardware": "h200"})");
  q.precision.dense = weights == "fp8" ? "fp8" : "bf16";
  q.precision.moe = weights;
  q.precision.kv = "bf16";
  q.workload.output = 1;
  for (const int batch : {1, 4, 16, 64, 128}) {
    for (const int context : {1024, 8192, 65536}) {
      q.workload.batch = batch;
      q.workload.input = context;
      const double seconds = engine_seconds(engine_step(q, PhaseKind::kDecode), costs);
      out["decode"].push_back({{"batch", batch}, {"context", context}, {"step_seconds", seconds}});
    }
  }
  for (const int prompt : {512, 2048, 16384}) {
    q.workload.input = prompt;
    q.workload.chunk = 2048;
    const double seconds = engine_seconds(engine_step(q, PhaseKind::kPrefill), costs);
    out["prefill"].push_back({{"prompt_tokens", prompt}, {"chunk", 2048}, {"seconds", seconds}});
  }
  return out;
}

TEST(Calibrate, EngineStepsThatFollowTheCostsArePredicted) {
  EngineCosts costs;
  costs.weights = 1.2;
  costs.quantised = 1.5;
  costs.cache = 1.3;
  costs.gemm = 1.6;
  costs.attention = 2;
  costs.prompts = 2.5;
  costs.activations = 5;
  costs.layer_s = 2e-5;
  costs.pass_s = 1e-4;
  const Json request = {{"hardware", "h200"},
                        {"bench", {engine_bench(costs, "bf16"), engine_bench(costs, "fp8")}}};
  const Json out = run_calibrate(request);
  EXPECT_EQ(out["rows"].size(), 36u);
  EXPECT_LT(out["summary"]["fitted"]["max_abs_error"].get<double>(), 0.01);
  EXPECT_LT(out["summary"]["held_out"]["max_abs_error"].get<double>(), 0.05);
  EXPECT_NEAR(out["profile"]["engine"]["weights"].get<double>(), 1.2, 0.05);

  // The profile reads back, and times plans of one card by these costs.
  Request q =
      parse(R"({"model": "deepseek-v2-lite", "hardware": "h200", "precision": {"dense": "bf16", "moe": "bf16",
                        "kv": "bf16"}, "workload": {"batch": 16, "input": 8192, "output": 1, "chunk": 2048}})");
  q.hardware = read_hardware(out["profile"], "test");
  const Result r = evaluate(q);
  EXPECT_NEAR(r.tpot_s, engine_seconds(engine_step(q, PhaseKind::kDecode), costs), 0.01 * r.tpot_s);
  EXPECT_NEAR(r.prefill.step_s, engine_seconds(engine_step(q, PhaseKind::kPrefill), costs),
              0.01 * r.prefill.step_s);
}

TEST(Calibrate, DraftsCostTheirTokensAndTheModule) {
  Request q = parse(R"({"model": "deepseek-v3", "hardware": "h200", "workload": {"batch": 4}})");
  const double plain = engine_seconds(engine_step(q, PhaseKind::kDecode), {});
  q.workload.mtp_draft = 1;
  const double one = engine_seconds(engine_step(q, PhaseKind::kDecode), {});
  q.workload.mtp_draft = 2;
  const double two = engine_seconds(engine_step(q, PhaseKind::kDecode), {});
  EXPECT_GT(one, plain);
  EXPECT_GT(two, one);
  EXPECT_LT(two, 3 * plain);
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
  fails(R"({"decode": [{"batch": 1, "context": 8, "step_seconds": 1}]})", "expected at least 12 steps");
  fails(R"({"decode": [{"batch": 0, "context": 8, "step_seconds": 1}]})", "decode[0].batch = 0");
  fails(R"({"decode": [{"batch": 1, "context": 8}]})", "decode[0].step_seconds = (missing)");
  fails(R"({"decode": 3})", "decode = not an array");
  fails(R"({"decode": [], "weights": "fp4"})", "weights");
  fails(R"({"decode": [], "command": "flash-mla bench-engine --config nowhere"})",
        "nowhere/config.json is not here");
  fails(R"([{"decode": []}, {"rows": []}])", "no key decode");
}

}  // namespace
}  // namespace flash_mla::planner
