#include "bench/sparse_bench.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "bench/gpu_report.h"
#include "bench/machine.h"
#include "bench/table.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kProtocol =
    "bf16 random data, caches of random tokens; us: median, each call behind a read pass over 256 MiB (cold L2) and "
    "a spin kernel, events around it, schedules on the device and combine included but the schedule of "
    "dense_fp8_decode, which callers make once a step; graph_us: per call of a CUDA graph of 20 back-to-back calls; "
    "host_us: host time per call over 1000 unsynchronised calls in batches; floor_us: from the preset's rates, "
    "without a launch; copy_us: a copy of as many bytes in the same process, timed as us";

std::string number(double us) { return fmt::format("{:.{}f}", us, us < 100 ? 2 : 1); }
std::string number(const std::optional<double>& us) { return us ? fmt::format("{:g}", *us) : "-"; }
std::string ratio(double us, double to) { return to > 0 ? fmt::format("{:.2f}", us / to) : "-"; }

std::vector<std::string> table_row(const gpu::SparseRow& r, const Rates& rates) {
  const SparseCase& c = r.shape;
  const double floor = c.floor_us(rates);
  if (!r.measured()) {
    return {c.name,
            "no kernel",
            number(floor),
            "-",
            "-",
            number(c.resolve_us),
            number(c.goal_us),
            number(c.best_us()),
            "-",
            "-",
            "-",
            "-"};
  }
  return {c.name,
          number(r.us),
          number(floor),
          ratio(r.us, floor),
          ratio(r.us, r.copy_us),
          number(c.resolve_us),
          number(c.goal_us),
          number(c.best_us()),
          ratio(r.us, c.best_us().value_or(0)),
          number(r.graph_us),
          r.host_us > 0 ? number(r.host_us) : "-",
          r.correct ? "ok" : "WRONG"};
}

/// null for what was not measured or does not exist.
Json optional_number(double x) { return x > 0 ? Json(x) : Json(nullptr); }
Json optional_number(const std::optional<double>& x) { return x ? Json(*x) : Json(nullptr); }

}  // namespace

std::string sparse_table(const std::vector<gpu::SparseRow>& rows, const Rates& rates) {
  Table table({"case", "us", "floor us", "over floor", "over copy", "resolve at", "goal", "best peer",
               "over best", "graph us", "host us", "check"});
  for (const gpu::SparseRow& row : rows) table.add(table_row(row, rates));
  std::string text = table.str();
  for (const gpu::SparseRow& row : rows) {
    if (!row.measured()) {
      text += fmt::format("no kernel in this build: {}: {}\n", row.shape.name, row.not_in_build);
    } else if (!row.correct) {
      text += fmt::format("WRONG: {}: {}\n", row.shape.name, row.failure);
    }
  }
  return text;
}

Json sparse_json(const gpu::SparseRow& r, const Rates& rates) {
  const SparseCase& c = r.shape;
  const double floor = c.floor_us(rates), best = c.best_us().value_or(0);
  Json json = {{"name", c.name},
               {"operation", sparse_operation_name(c.operation)},
               {"format", kv_format_name(c.format)},
               {"b", c.b},
               {"s_q", c.s_q},
               {"h_q", c.h_q},
               {"s_kv", c.s_kv},
               {"topk", c.topk},
               {"page_size", c.page_size},
               {"extra_topk", c.extra_topk},
               {"extra_page_size", c.extra_page_size},
               {"flop", c.flop()},
               {"bytes", c.bytes()},
               {"floor_us", floor},
               {"best_us", optional_number(c.best_us())},
               {"peers_us", c.peers_us},
               {"resolve_us", optional_number(c.resolve_us)},
               {"goal_us", optional_number(c.goal_us)},
               {"measured", r.measured()}};
  if (!r.measured()) {
    json["not_in_build"] = r.not_in_build;
    return json;
  }
  json["reps"] = r.reps;
  json["us"] = r.us;
  json["us_least"] = r.us_least;
  json["graph_us"] = r.graph_us;
  json["host_us"] = optional_number(r.host_us);
  json["copy_us"] = optional_number(r.copy_us);
  json["copy_graph_us"] = optional_number(r.copy_graph_us);
  json["over_floor"] = r.us / floor;
  json["over_best"] = best > 0 ? Json(r.us / best) : Json(nullptr);
  json["over_copy"] = r.copy_us > 0 ? Json(r.us / r.copy_us) : Json(nullptr);
  json["workspace_bytes"] = r.workspace_bytes;
  json["max_abs_error"] = r.max_abs_error;
  json["correct"] = r.correct;
  return json;
}

int run_sparse_bench(const SparseBenchOptions& o) {
  const auto progress = [&](const std::string& line) {
    if (!o.quiet) fmt::print(stderr, "bench: {}\n", line);
  };
  const gpu::Device device = gpu::device();
  progress("measuring the GPU's limits");
  const gpu::Limits limits = gpu::measure_limits();
  std::vector<gpu::SparseRow> rows;
  int failed = 0, measured = 0;
  for (const SparseCase& c : o.preset.cases) {
    progress(fmt::format("{} of {}: {}", rows.size() + 1, o.preset.cases.size(), c.name));
    // Another seed for every row, so that no row's check repeats another's.
    rows.push_back(gpu::measure_sparse(c, {o.reps, o.seed + rows.size()}));
    measured += rows.back().measured() ? 1 : 0;
    failed += rows.back().measured() && !rows.back().correct ? 1 : 0;
  }

  fmt::print("{}, driver {}, CUDA {}; cold; commit {}\n\n", device.name, device.driver, device.cuda,
             commit());
  fmt::print("{}", sparse_table(rows, o.preset.rates));
  fmt::print("{} of {} cases correct, {} without a kernel\n", measured - failed, measured,
             rows.size() - static_cast<std::size_t>(measured));
  fmt::print("{}\n", limits_line(limits));
  if (!o.json.empty()) {
    Json json = gpu_report(device, kProtocol);
    json["seed"] = o.seed;
    json["limits"] = to_json(limits);
    json["rates"] = {{"read_gbps", o.preset.rates.read_gbps},
                     {"copy_gbps", o.preset.rates.copy_gbps},
                     {"mma_tflops", o.preset.rates.mma_tflops}};
    json["rows"] = Json::array();
    for (const gpu::SparseRow& row : rows) json["rows"].push_back(sparse_json(row, o.preset.rates));
    write_json(o.json, json);
    fmt::print("wrote {}\n", o.json);
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace flash_mla::bench
