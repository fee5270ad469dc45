// `flash-mla plan calibrate` of bench-engine's results.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "planner/calibrate.h"
#include "planner/engine_step.h"

namespace flash_mla::planner {
namespace {

constexpr std::int64_t kMost = 1 << 28;

/// The model that was measured: written into the result, or what its command says.
Model model_of(ObjectReader& top) {
  if (top.has("model")) return find_model(*top.find("model"), "model");
  const std::string command = top.text("command", "");
  constexpr std::string_view kFlag = "--config ";
  const std::size_t at = command.find(kFlag);
  if (at == std::string::npos) return find_model("deepseek-v2-lite", "model");
  const std::size_t begin = at + kFlag.size();
  const std::string folder = command.substr(begin, command.find(' ', begin) - begin);
  const std::string file = (std::filesystem::path(folder) / "config.json").string();
  if (!std::filesystem::exists(file)) {
    top.fail("command", command,
             fmt::format("the model it measured; {} is not here, and there is no key model", file));
  }
  return find_model(Json(file), "model");
}

/// Calls row(entry) for the entries of `key`, if there are any.
template <class F>
void for_rows(const Json& json, const std::string& source, const char* key, const F& row) {
  if (!json.contains(key)) return;
  if (!json[key].is_array()) ObjectReader(json, source).fail(key, "not an array", "an array of measurements");
  for (std::size_t i = 0; i < json[key].size(); ++i)
    row(ObjectReader(json[key][i], source, fmt::format("{}[{}]", key, i)));
}

Json costs_json(EngineCosts e) {
  Json out = Json::object();
  for (const auto& [key, value] : engine_factors(e)) out[key] = *value;
  out["layer_us"] = e.layer_s * 1e6;
  out["indexer_us"] = e.indexer_s * 1e6;
  out["pass_us"] = e.pass_s * 1e6;
  return out;
}

}  // namespace

bool is_engine_bench(const Json& json) { return json.is_object() && json.contains("decode"); }

std::vector<EngineRow> read_engine_bench(const Json& json, const std::string& source,
                                         const Hardware& hardware) {
  ObjectReader top(json, source);
  Request q;
  q.model = model_of(top);
  q.hardware = hardware;
  const std::string weights = top.choice("weights", "bf16", {"bf16", "fp8", "w4a8"});
  q.precision.moe = weights;
  q.precision.dense = weights == "fp8" ? "fp8" : "bf16";
  q.precision.kv = top.choice("cache", "bf16", {"bf16", "fp8"}) == "fp8" ? "fp8_656" : "bf16";
  q.workload.output = 1;
  std::vector<EngineRow> out;
  for_rows(json, source, "decode", [&](ObjectReader r) {
    q.workload.batch = r.integer("batch", 1, kMost);
    q.workload.input = r.integer("context", 1, kMost);
    out.push_back({source, false, q.workload.batch, q.workload.input, r.number("step_seconds", 1e-9, 1e6),
                   engine_step(q, PhaseKind::kDecode)});
  });
  for_rows(json, source, "prefill", [&](ObjectReader r) {
    q.workload.input = r.integer("prompt_tokens", 1, kMost);
    q.workload.chunk = r.integer("chunk", 1, kMost);
    out.push_back({source, true, 1, q.workload.input, r.number("seconds", 1e-9, 1e6),
                   engine_step(q, PhaseKind::kPrefill)});
  });
  return out;
}

Json calibrate_engine(const Hardware& hardware, const Json& bench) {
  std::vector<EngineRow> rows;
  Json sources = Json::array();
  for (const Json& one : bench) {
    std::string source;
    const Json json = read_source(one, source);
    if (!is_engine_bench(json)) {
      throw InvalidArgument(
          fmt::format("{}: no key decode: expected a result of bench-engine, as the first one is", source));
    }
    const std::vector<EngineRow> more = read_engine_bench(json, source, hardware);
    rows.insert(rows.end(), more.begin(), more.end());
    Json origin = {{"file", source}};
    for (const char* key : {"machine", "commit", "command", "gpu"}) {
      if (json.contains(key)) origin[key] = json[key];
    }
    sources.push_back(origin);
  }
  const EngineCosts costs = fit_engine(rows);
  Json out_rows = Json::array();
  std::vector<double> errors, unseen;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const EngineRow& row = rows[i];
    const double seconds = engine_seconds(row.step, costs);
    errors.push_back(seconds / row.seconds - 1);
    Json o = {{"source", row.source},
              {"phase", row.prefill ? "prefill" : "decode"},
              {"batch", row.batch},
              {"tokens", row.tokens},
              {"measured_ms", row.seconds * 1e3},
              {"predicted_ms", seconds * 1e3},
              {"error", seconds / row.seconds - 1}};
    if (rows.size() > kEngineCosts) {
      std::vector<EngineRow> others = rows;
      others.erase(others.begin() + static_cast<std::ptrdiff_t>(i));
      const double held_out = engine_seconds(row.step, fit_engine(others));
      unseen.push_back(held_out / row.seconds - 1);
      o["held_out_ms"] = held_out * 1e3;
      o["held_out_error"] = held_out / row.seconds - 1;
    }
    out_rows.push_back(o);
  }
  Json summary = {{"rows", rows.size()}, {"fitted", summarize(errors)}};
  if (!unseen.empty()) summary["held_out"] = summarize(unseen);
  Json profile = measured_profile(hardware);
  profile["engine"] = costs_json(costs);
  profile["calibration"] = {{"sources", sources}, {"summary", summary}};
  return {{"command", "calibrate"}, {"profile", profile}, {"summary", summary}, {"rows", out_rows}};
}

}  // namespace flash_mla::planner
