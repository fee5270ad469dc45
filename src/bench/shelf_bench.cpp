#include "bench/shelf_bench.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "bench/gpu_report.h"
#include "bench/machine.h"
#include "bench/table.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kProtocol =
    "bf16 random data; us: median, each call behind a read pass over 256 MiB (cold L2) and a spin kernel, events around "
    "it, combining included, the schedule of decode not; graph_us: per call of a CUDA graph of 20 back-to-back calls; "
    "host_us: host time per call over 1000 unsynchronised calls in batches; floor_us: from this process's limits, "
    "without a launch: of attention the longer of its FLOP by the matmul rate and its bytes by the read rate, of rows "
    "their bytes by the copy rate; copy_us: a copy of as many bytes, timed as us";

std::string number(double us) { return us > 0 ? fmt::format("{:.{}f}", us, us < 100 ? 2 : 1) : "-"; }
std::string ratio(double us, double to) { return to > 0 ? fmt::format("{:.2f}", us / to) : "-"; }

std::vector<std::string> table_row(const gpu::ShelfRow& r, const Rates& rates) {
  const ShelfCase& c = r.shape;
  const double floor = c.floor_us(rates);
  if (!r.measured()) return {c.name, "no kernel", number(floor), "-", "-", "-", "-", "-", "-", "-"};
  return {c.name,
          number(r.us),
          number(floor),
          ratio(r.us, floor),
          ratio(r.us, r.copy_us),
          c.flop() > 0 ? fmt::format("{:.0f}", c.flop() / r.us / 1e6) : "-",
          fmt::format("{:.0f}", c.bytes() / r.us / 1e3),
          number(r.graph_us),
          number(r.host_us),
          r.correct ? "ok" : "WRONG"};
}

/// null for what was not measured or does not exist.
Json optional_number(double x) { return x > 0 ? Json(x) : Json(nullptr); }

Rates rates_of(const gpu::Limits& limits) {
  return {limits.read_gbps, limits.copy_gbps, limits.matmul_gflops / 1e3};
}

}  // namespace

std::string shelf_table(const std::vector<gpu::ShelfRow>& rows, const Rates& rates) {
  Table table({"call", "us", "floor us", "over floor", "over copy", "TFLOP/s", "GB/s", "graph us", "host us",
               "check"});
  for (const gpu::ShelfRow& row : rows) table.add(table_row(row, rates));
  std::string text = table.str();
  for (const gpu::ShelfRow& row : rows) {
    if (!row.measured()) {
      text += fmt::format("no kernel in this build: {}: {}\n", row.shape.name, row.not_in_build);
    } else if (!row.correct) {
      text += fmt::format("WRONG: {}: {}\n", row.shape.name, row.failure);
    }
  }
  return text;
}

Json shelf_json(const gpu::ShelfRow& r, const Rates& rates) {
  const ShelfCase& c = r.shape;
  Json json = {{"name", c.name}, {"operation", shelf_operation_name(c.operation)}};
  if (c.attention()) {
    json.update({{"b", c.b},
                 {"s_q", c.s_q},
                 {"s_k", c.s_k},
                 {"causal", c.causal},
                 {"page_size", c.page_size},
                 {"h_q", c.h_q},
                 {"h_kv", c.h_kv},
                 {"d_qk", c.d_qk()},
                 {"d_v", c.d_v()}});
  } else {
    json.update({{"tokens", c.tokens}, {"h_q", c.h_q}, {"h_kv", c.h_kv}, {"d", c.d}, {"topk", c.topk}});
  }
  const double floor = c.floor_us(rates);
  json["flop"] = c.flop();
  json["bytes"] = c.bytes();
  json["floor_us"] = floor;
  json["measured"] = r.measured();
  if (!r.measured()) {
    json["not_in_build"] = r.not_in_build;
    return json;
  }
  json["reps"] = r.reps;
  json["us"] = r.us;
  json["us_least"] = r.us_least;
  json["graph_us"] = optional_number(r.graph_us);
  json["host_us"] = optional_number(r.host_us);
  json["copy_us"] = optional_number(r.copy_us);
  json["copy_graph_us"] = optional_number(r.copy_graph_us);
  json["over_floor"] = r.us / floor;
  json["over_copy"] = r.copy_us > 0 ? Json(r.us / r.copy_us) : Json(nullptr);
  json["tflops"] = optional_number(c.flop() / r.us / 1e6);
  json["gbps"] = c.bytes() / r.us / 1e3;
  json["workspace_bytes"] = r.workspace_bytes;
  json["max_abs_error"] = r.max_abs_error;
  json["correct"] = r.correct;
  return json;
}

int run_shelf_bench(const ShelfBenchOptions& o) {
  const auto progress = [&](const std::string& line) {
    if (!o.quiet) fmt::print(stderr, "bench: {}\n", line);
  };
  const gpu::Device device = gpu::device();
  progress("measuring the GPU's limits");
  const gpu::Limits limits = gpu::measure_limits();
  const Rates rates = rates_of(limits);
  std::vector<gpu::ShelfRow> rows;
  int failed = 0, measured = 0;
  for (const ShelfCase& c : o.calls) {
    progress(fmt::format("{} of {}: {}", rows.size() + 1, o.calls.size(), c.name));
    // Another seed for every row, so that no row's check repeats another's.
    rows.push_back(gpu::measure_shelf(c, {o.reps, o.seed + rows.size()}));
    measured += rows.back().measured() ? 1 : 0;
    failed += rows.back().measured() && !rows.back().correct ? 1 : 0;
  }

  fmt::print("{}, driver {}, CUDA {}; cold; commit {}\n\n", device.name, device.driver, device.cuda,
             commit());
  fmt::print("{}", shelf_table(rows, rates));
  fmt::print("{} of {} calls correct, {} without a kernel\n", measured - failed, measured,
             rows.size() - static_cast<std::size_t>(measured));
  fmt::print("{}\n", limits_line(limits));
  if (!o.json.empty()) {
    Json json = gpu_report(device, kProtocol);
    json["seed"] = o.seed;
    json["limits"] = to_json(limits);
    json["rows"] = Json::array();
    for (const gpu::ShelfRow& row : rows) json["rows"].push_back(shelf_json(row, rates));
    write_json(o.json, json);
    fmt::print("wrote {}\n", o.json);
  }
  return failed == 0 ? 0 : 1;
}

}  // namespace flash_mla::bench
