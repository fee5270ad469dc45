#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <set>

#include "planner/sheet.h"
#include "requests.h"

namespace flash_mla::planner {
namespace {

Json run(const char* request) { return Json::parse(run_json(request)); }

void expect_error(const std::string& request, std::initializer_list<const char*> parts) {
  try {
    run_json(request);
    ADD_FAILURE() << "accepted: " << request;
  } catch (const InvalidArgument& e) {
    for (const char* part : parts) EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(Json, PlanHasEveryOutput) {
  const Json r = run(R"({"plan": {"ep": 16}, "precision": {"moe": "w4a8"}, "prices": {"card_hour": 2},
                         "workload": {"arrival_rate": 10}})");
  for (const char* phase : {"prefill", "decode"}) {
    for (const char* key : {"flop", "resident_bytes", "bytes_moved", "bytes_sent", "time_s", "mfu",
                            "memory_share", "bottleneck", "flags", "operators"}) {
      EXPECT_TRUE(r[phase].contains(key)) << phase << " " << key;
    }
  }
  for (const char* key :
       {"ttft_s", "tpot_s", "output_tokens_per_s_card", "max_sequences", "chunk_knee_tokens",
        "prefill_cards_per_decode_card", "cost_per_million_output", "tco_per_hour"}) {
    EXPECT_GT(r["summary"][key].get<double>(), 0) << key;
  }
  EXPECT_TRUE(r["fits"].get<bool>());
}

TEST(Json, ADeploymentIsTheFewestCardsThatWillDo) {
  const char* asked = R"({"command": "deployment", "users": 500, "tokens_per_s": 40,
                          "base": {"hardware": "h200", "set": {"input": 2000, "output": 500}}})";
  const Json best = run(asked)["best"];
  EXPECT_EQ(best["cards"].get<double>(),
            best["decode"]["cards"].get<double>() + best["prefill"]["cards"].get<double>());
  EXPECT_GE(best["tokens_per_s_user"].get<double>(), 40);
  const Json& d = best["decode"];
  EXPECT_GE(d["instances"].get<int>() * d["plan"]["dp"].get<int>() * d["batch"].get<int>(), 500);
  EXPECT_LE(d["memory_share"].get<double>(), 1);
  // The plan that it names says the same of itself.
  Json one = Json::parse(R"({"hardware": "h200", "set": {"input": 2000, "output": 500}})");
  for (const char* key : {"tp", "ep", "dp", "pp", "cp"}) one["plan"][key] = d["plan"][key];
  one["set"]["batch"] = d["batch"];
  EXPECT_DOUBLE_EQ(run(one.dump().c_str())["summary"]["tpot_s"].get<double>(), best["tpot_s"].get<double>());
  // No other plan of one copy does it on fewer cards.
  for (int tp = 1; tp <= 8; tp *= 2) {
    for (int ep = 1; ep * tp / std::min(ep, tp) < d["cards"].get<double>(); ep *= 2) {
      one["plan"] = {{"tp", tp}, {"ep", ep}};
      const int dp = std::max(1, ep / tp);
      if (tp * dp % ep != 0) continue;
      one["set"]["batch"] = (500 + dp - 1) / dp;
      const Json r = run(one.dump().c_str());
      EXPECT_TRUE(r["summary"]["tpot_s"].get<double>() > 1.0 / 40 ||
                  r["decode"]["memory_share"].get<double>() > 1)
          << tp << " " << ep;
    }
  }
  // What is given is kept.
  const Json given =
      run(R"({"command": "deployment", "users": 500, "base": {"plan": {"ep": 64, "tp": 2}}})")["best"];
  EXPECT_EQ(given["decode"]["plan"]["ep"], 64);
  EXPECT_EQ(given["prefill"]["plan"]["tp"], 2);
  // A first token by that time takes more cards, or none will do.
  const auto by = [](double ms) {
    return run(
        fmt::format(R"({{"command": "deployment", "users": 500, "base": {{"slo": {{"ttft_ms": {}}}}}}})", ms)
            .c_str())["best"];
  };
  EXPECT_LE(by(0)["cards"].get<double>(), by(300)["cards"].get<double>());
  EXPECT_LE(by(300)["ttft_s"].get<double>(), 0.3);
  EXPECT_TRUE(by(0.01).is_null());
  expect_error(R"({"command": "deployment"})", {"users"});
  expect_error(R"({"command": "deployment", "users": 1, "base": 5})", {"base", "5"});
  expect_error(
      R"({"command": "deployment", "users": 1, "base": {"hardware": "a100", "precision": {"attention": "fp8"}}})",
      {"precision.attention"});
}

TEST(Json, ExplainedEquationsReadBack) {
  const Sheet empty({}, {});
  const std::vector<double> none;
  for (const char* request :
       {R"({"explain": true, "plan": {"ep": 16}})",
        R"({"explain": true, "mode": "article", "plan": {"tp": 8, "ep": 8}})",
        R"({"explain": true, "model": "deepseek-v3.2", "plan": {"tp": 2, "ep": 32, "pp": 2},
                                  "workload": {"mtp_draft": 1, "mtp_acceptance": 0.7, "chunk": 700, "input": 20000}})"}) {
    const Json r = run(request);
    std::set<int> formulas;
    ASSERT_GT(r["explain"].size(), 50u);
    for (const Json& step : r["explain"]) {
      EXPECT_DOUBLE_EQ(empty.evaluate(step["substituted"].get<std::string>(), none),
                       step["value"].get<double>())
          << step["name"];
      formulas.insert(step["formula"].get<int>());
    }
    if (r["mode"] == "article") {
      // 8 is the sum inside 9 and 10; 16 and 21 are the definitions that 20 and 25 write out.
      for (int n = 1; n <= 28; ++n) EXPECT_EQ(formulas.count(n), n == 8 || n == 16 || n == 21 ? 0u : 1u) << n;
    }
  }
}

TEST(Json, ErrorsNameSourceKeyValueAndWhatIsAllowed) {
  expect_error("{", {"request", "not valid JSON"});
  expect_error("[]", {"expected a JSON object"});
  expect_error(R"({"command": "fly"})", {"command", "fly", "plan, sweep, compare"});
  expect_error(R"({"model": "gpt"})", {"model", "gpt", "deepseek-v3"});
  expect_error(R"({"hardware": 3})", {"hardware", "3", "h200"});
  expect_error(R"({"hardware": "/nowhere.json"})", {"/nowhere.json", "cannot be read"});
  expect_error(R"({"workload": {"batch": 0}})", {"request", "workload.batch", "= 0", "from 1"});
  expect_error(R"({"workload": {"batch": 1.5}})", {"workload.batch", "1.5", "integer"});
  expect_error(R"({"workload": {"batch": "many"}})", {"workload.batch", "many", "integer"});
  expect_error(R"({"workload": {"bach": 1}})", {"unknown key workload.bach", "batch"});
  expect_error(R"({"workload": []})", {"workload", "object"});
  expect_error(R"({"precision": {"kv": "int2"}})", {"precision.kv", "int2", "fp8_656"});
  expect_error(R"({"set": {"speed": 3}})", {"unknown key speed", "batch"});
  expect_error(R"({"mode": "guess"})", {"mode", "guess", "article, exact"});
  expect_error(R"({"prices": {"card_price": 1}})", {"prices.years"});
  expect_error(R"({"command": "sweep"})", {"axes", "missing"});
  expect_error(R"({"command": "sweep", "axes": {"ep": []}})", {"axes.ep"});
  expect_error(R"({"command": "sweep", "axes": {"ep": [3]}})", {"ep", "= 3", "256"});
  expect_error(R"({"command": "compare", "cases": []})", {"cases"});
}

TEST(Json, FilesAreNamedInErrors) {
  const std::string path = testing::TempDir() + "planner_model.json";
  {
    std::ifstream none;
    std::ofstream(path) << R"({"hidden_size": 7168, "num_hidden_layers": -1})";
  }
  expect_error(R"({"model": ")" + path + "\"}", {path.c_str(), "num_hidden_layers", "-1", "from 1"});
  std::ofstream(path) << R"({"hidden_size": 7168})";
  expect_error(R"({"model": ")" + path + "\"}", {path.c_str(), "num_hidden_layers", "(missing)"});
  std::remove(path.c_str());
}

TEST(Json, HostileNumbersNeverGiveNan) {
  for (const char* request : {R"({"workload": {"batch": 1e300}})", R"({"workload": {"input": -5}})",
                              R"({"workload": {"arrival_rate": -1}})", R"({"plan": {"tp": 0}})",
                              R"({"plan": {"ep": 1e18}})", R"({"hardware": {"peak_tflops": {"bf16": 0}}})"}) {
    EXPECT_THROW(run_json(request), InvalidArgument) << request;
  }
  const std::string text =
      run_json(R"({"plan": {"ep": 256}, "workload": {"batch": 16777216, "input": 1, "output": 1}})");
  EXPECT_EQ(text.find("nan"), std::string::npos);
  EXPECT_EQ(text.find("null"),
            text.find("\"gain\":null") == std::string::npos ? std::string::npos : text.find("null"));
}

TEST(Json, SweepKeepsOrderAndMarksRows) {
  const Json r = run(R"({"command": "sweep", "base": {"precision": {"moe": "w4a8"}, "slo": {"tpot_ms": 40}},
                         "axes": {"ep": [7, 8, 16], "batch": [1, 32, 4000]}})");
  ASSERT_EQ(r["rows"].size(), 9u);
  EXPECT_TRUE(r["rows"][0].contains("error"));
  EXPECT_EQ(r["rows"][3]["ep"], 8);
  EXPECT_EQ(r["rows"][4]["batch"], 32);
  EXPECT_FALSE(r["rows"][5]["fits"].get<bool>());
  const auto best = r["best"].get<std::size_t>();
  for (const Json& row : r["rows"]) {
    if (row.value("meets_slo", false)) {
      EXPECT_LE(row["output_tokens_per_s_card"].get<double>(),
                r["rows"][best]["output_tokens_per_s_card"].get<double>());
    }
  }
  EXPECT_LE(r["rows"][best]["tpot_ms"].get<double>(), 40);
}

TEST(Json, SweepOfTenThousandPlans) {
  Json request = {{"command", "sweep"}, {"base", {{"precision", {{"moe", "w4a8"}}}}}};
  request["axes"] = {{"ep", {8, 16, 32, 64}}, {"batch", Json::array()}};
  for (int batch = 1; batch <= 2500; ++batch) request["axes"]["batch"].push_back(batch);
  const auto start = std::chrono::steady_clock::now();
  const std::string result = run_json(request.dump());
  printf("a sweep of 10,000 plans, JSON in and out: %.3f s\n",
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  EXPECT_EQ(Json::parse(result)["rows"].size(), 10000u);
}

TEST(Json, CompareNamesTheCheapestWhenPriced) {
  const Json r = run(R"({"command": "compare", "cases": [
      {"name": "dear", "set": {"hardware": "h200", "ep": 16, "card_hour": 1000}},
      {"name": "cheap", "set": {"hardware": "h20", "ep": 16, "card_hour": 1}}]})");
  EXPECT_EQ(r["rows"][r["best"].get<std::size_t>()]["name"], "cheap");
  EXPECT_GT(r["rows"][0]["output_tokens_per_s_card"].get<double>(),
            r["rows"][1]["output_tokens_per_s_card"].get<double>());
}

TEST(Json, SingleRowOfASweepIsThePlan) {
  const Json sweep = run(R"({"command": "sweep", "base": {"hardware": "h200"}, "axes": {"ep": [32]}})");
  const Json plan = run(R"({"hardware": "h200", "plan": {"ep": 32}})");
  EXPECT_DOUBLE_EQ(sweep["rows"][0]["tpot_ms"].get<double>(), 1e3 * plan["summary"]["tpot_s"].get<double>());
}

TEST(Json, AdviceHelps) {
  const Json r = run(R"({"plan": {"ep": 1}})");
  EXPECT_FALSE(r["fits"].get<bool>());
  ASSERT_FALSE(r["advice"].empty());
  const Json tight = run(R"({"plan": {"ep": 16}, "workload": {"batch": 4}})");
  ASSERT_FALSE(tight["advice"].empty());
  for (const Json& a : tight["advice"]) EXPECT_GE(a["gain"].get<double>(), 0.01);
}

TEST(Json, RenderFormats) {
  const std::string plan = run_json(R"({"plan": {"ep": 16}})");
  EXPECT_NE(render(plan, "table").find("bottleneck"), std::string::npos);
  EXPECT_NE(render(plan, "csv").find("decode.time_s.step,"), std::string::npos);
  EXPECT_EQ(Json::parse(render(plan, "json")), Json::parse(plan));
  const std::string sweep = run_json(R"({"command": "sweep", "axes": {"ep": [16, 32]}})");
  const std::string csv = render(sweep, "csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 3);
  EXPECT_THROW(render(plan, "xml"), InvalidArgument);
  EXPECT_THROW(render("{}", "table"), InvalidArgument);
}

}  // namespace
}  // namespace flash_mla::planner
