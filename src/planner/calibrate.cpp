#include "planner/calibrate.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "planner/engine_step.h"

namespace flash_mla::planner {
namespace {

constexpr double kLatent = 512, kRope = 64;  // the head dims every DeepSeek MLA model has

double loss(const std::vector<BenchRow>& rows, const Hardware& h, const std::array<double, 3>& x) {
  Efficiency e;
  e.attention_compute = x[0];
  e.attention_memory = x[1];
  e.attention_launch_s = x[2];
  double sum = 0;
  for (const BenchRow& row : rows) {
    const double error = std::log(predict_attention(row, h, e) / (row.ms / 1e3));
    sum += error * error;
  }
  return sum;
}

}  // namespace

Json summarize(std::vector<double> errors) {
  for (double& e : errors) e = std::abs(e);
  std::sort(errors.begin(), errors.end());
  const std::size_t n = errors.size();
  const double median = n % 2 == 1 ? errors[n / 2] : (errors[n / 2 - 1] + errors[n / 2]) / 2;
  return {{"median_abs_error", median}, {"max_abs_error", errors.back()}};
}

std::vector<BenchRow> read_bench(const Json& json, const std::string& source) {
  ObjectReader top(json, source);
  const Json* rows = top.find("rows");
  if (rows == nullptr || !rows->is_array() || rows->empty()) {
    top.fail("rows",
             rows == nullptr    ? "(missing)"
             : rows->is_array() ? "[]"
                                : "not an array",
             "an array of measurements");
  }
  std::vector<BenchRow> out;
  for (std::size_t i = 0; i < rows->size(); ++i) {
    ObjectReader r((*rows)[i], source, fmt::format("rows[{}]", i));
    constexpr std::int64_t kMax = 1 << 28;
    BenchRow row;
    row.b = r.integer("b", 1, kMax);
    row.s_q = r.integer("s_q", 1, kMax);
    row.h_q = r.integer("h_q", 1, kMax);
    row.h_kv = r.integer("h_kv", 1, 1, kMax);
    row.s_k = r.integer("s_k", 1, kMax);
    row.dtype = r.text("dtype", "bf16");
    if (row.dtype == "bfloat16") row.dtype = "bf16";
    row.ms = r.number("ms", 1e-6, 1e9);
    out.push_back(row);
  }
  return out;
}

double attention_flop(const BenchRow& r) {
  return 2.0 * static_cast<double>(r.b) * static_cast<double>(r.s_q) * static_cast<double>(r.h_q) *
         static_cast<double>(r.s_k) * (2 * kLatent + kRope);
}

double attention_bytes(const BenchRow& r) {
  const double slot = r.dtype == "bf16" ? 2 * (kLatent + kRope) : kLatent + 4 * kLatent / 128 + 2 * kRope;
  const double queries = static_cast<double>(r.b) * static_cast<double>(r.s_q) * static_cast<double>(r.h_q);
  return static_cast<double>(r.b) * static_cast<double>(r.s_k) * static_cast<double>(r.h_kv) * slot +
         2 * queries * (2 * kLatent + kRope);
}

double predict_attention(const BenchRow& row, const Hardware& h, const Efficiency& e) {
  return std::max(attention_flop(row) / (h.peak_bf16 * e.attention_compute),
                  attention_bytes(row) / (h.memory_bandwidth * e.attention_memory)) +
         e.attention_launch_s;
}

Efficiency fit_attention(const std::vector<BenchRow>& rows, const Hardware& h) {
  if (rows.size() < 3) {
    throw InvalidArgument(
        fmt::format("rows = {}: expected at least 3 measurements for 3 unknowns", rows.size()));
  }
  // A coarse grid, then ever finer ones around the best point: no start to choose, the same result every
  // time.
  double fastest = rows[0].ms;
  for (const BenchRow& row : rows) fastest = std::min(fastest, row.ms);
  const std::array<double, 3> low = {0.01, 0.01, 0}, high = {1, 1, fastest / 1e3};
  std::array<double, 3> best = {0.5, 0.5, high[2] / 2};
  double best_loss = loss(rows, h, best);
  std::array<double, 3> radius = {0.5, 0.5, high[2] / 2};
  constexpr int kSteps = 4;
  for (int round = 0; round < 24; ++round) {
    const std::array<double, 3> center = best;
    for (int i = -kSteps; i <= kSteps; ++i) {
      for (int j = -kSteps; j <= kSteps; ++j) {
        for (int k = -kSteps; k <= kSteps; ++k) {
          const std::array<int, 3> step = {i, j, k};
          std::array<double, 3> x;
          for (int a = 0; a < 3; ++a) {
            x[a] = std::clamp(center[a] + radius[a] * step[a] / kSteps, low[a], high[a]);
          }
          const double l = loss(rows, h, x);
          if (l < best_loss) best_loss = l, best = x;
        }
      }
    }
    for (double& r : radius) r *= 0.6;
  }
  Efficiency e = h.efficiency;
  e.attention_compute = best[0];
  e.attention_memory = best[1];
  e.attention_launch_s = best[2];
  return e;
}

Json measured_profile(const Hardware& h) {
  Json profile = {{"name", h.name + ", measured"},
                  {"peak_tflops", {{"bf16", h.peak_bf16 / 1e12}}},
                  {"memory_gb", h.memory_bytes / 1e9},
                  {"memory_bandwidth_gb_s", h.memory_bandwidth / 1e9},
                  {"nvlink_both_directions_gb_s", h.nvlink_both_directions / 1e9},
                  {"network_one_way_gb_s", h.network_one_way / 1e9},
                  {"cards_per_node", h.cards_per_node},
                  {"reserve_gb", h.reserve_bytes / 1e9}};
  profile["peak_tflops"]["fp8"] = h.peak_fp8 > 0 ? Json(h.peak_fp8 / 1e12) : Json(nullptr);
  return profile;
}

Json read_source(const Json& one, std::string& name) {
  name = "bench";
  if (!one.is_string()) return one;
  name = one.get<std::string>();
  const auto shipped = std::ranges::find(data_files(), "measured/" + name + ".json", &DataFile::path);
  return shipped != data_files().end() ? parse_json(shipped->text, "data/" + std::string(shipped->path))
                                       : load_json(name);
}

Json run_calibrate(const Json& request) {
  ObjectReader r(request, "request");
  r.text("command", "calibrate");
  static const Json kDefault = "h200";
  const Hardware h = find_hardware(r.has("hardware") ? *r.find("hardware") : kDefault, "hardware");
  const std::string dtype = r.choice("dtype", "bf16", {"bf16", "fp8"});
  if (!r.has("bench")) r.fail("bench", "(missing)", "a path, an object, or an array of them");
  const Json& bench = *r.find("bench");
  const Json list = bench.is_array() ? bench : Json::array({bench});
  r.finish();
  std::string first;
  if (!list.empty() && is_engine_bench(read_source(list.front(), first))) return calibrate_engine(h, list);

  std::vector<BenchRow> rows;
  Json sources = Json::array();
  for (const Json& one : list) {
    std::string source;
    const Json json = read_source(one, source);
    for (const BenchRow& row : read_bench(json, source)) {
      if (row.dtype == dtype) rows.push_back(row);
    }
    Json origin = Json::object();
    origin["file"] = source;
    for (const char* key : {"machine", "commit", "command", "note"}) {
      if (json.contains(key)) origin[key] = json[key];
    }
    sources.push_back(origin);
  }
  if (rows.size() < 3) {
    throw InvalidArgument(
        fmt::format("request: bench = {} rows of dtype {}: expected at least 3", rows.size(), dtype));
  }
  const Efficiency e = fit_attention(rows, h);
  // Each half predicted from the other: what the error is on shapes the fit has not seen.
  std::vector<BenchRow> halves[2];
  for (std::size_t i = 0; i < rows.size(); ++i) halves[i % 2].push_back(rows[i]);
  const bool held_out = halves[0].size() >= 3 && halves[1].size() >= 3;
  Efficiency from_half[2];
  if (held_out) {
    for (int i = 0; i < 2; ++i) from_half[i] = fit_attention(halves[i], h);
  }

  Json out_rows = Json::array();
  std::vector<double> errors, unseen, peaks;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const BenchRow& row = rows[i];
    const double ms = 1e3 * predict_attention(row, h, e);
    const double peak_ms = 1e3 * predict_attention(row, h, Efficiency{});
    errors.push_back(ms / row.ms - 1);
    peaks.push_back(peak_ms / row.ms - 1);
    Json o = {{"b", row.b},
              {"s_q", row.s_q},
              {"h_q", row.h_q},
              {"s_k", row.s_k},
              {"measured_ms", row.ms},
              {"predicted_ms", ms},
              {"error", ms / row.ms - 1},
              {"peak_ms", peak_ms}};
    if (held_out) {
      const double other = 1e3 * predict_attention(row, h, from_half[1 - i % 2]);
      unseen.push_back(other / row.ms - 1);
      o["held_out_ms"] = other;
      o["held_out_error"] = other / row.ms - 1;
    }
    out_rows.push_back(o);
  }
  Json summary = {{"rows", rows.size()}, {"fitted", summarize(errors)}, {"at_peak", summarize(peaks)}};
  if (held_out) summary["held_out"] = summarize(unseen);

  Json profile = measured_profile(h);
  profile["efficiency"] = {{"attention_compute", e.attention_compute},
                           {"attention_memory", e.attention_memory},
                           {"attention_launch_us", e.attention_launch_s * 1e6},
                           {"gemm", e.gemm},
                           {"memory", e.memory},
                           {"link", e.link}};
  profile["calibration"] = {{"dtype", dtype}, {"sources", sources}, {"summary", summary}};
  return {{"command", "calibrate"}, {"profile", profile}, {"summary", summary}, {"rows", out_rows}};
}

}  // namespace flash_mla::planner
