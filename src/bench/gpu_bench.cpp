#include "bench/gpu_bench.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "bench/dtype.h"
#include "bench/explain.h"
#include "bench/gpu/bench.h"
#include "bench/gpu_report.h"
#include "bench/machine.h"
#include "bench/table.h"
#include "flash_mla/info.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kProtocol =
    "bf16 or fp16 random data; ms: median, each call behind a read pass over 256 MiB (cold L2) and a spin "
    "kernel, "
    "events around it, schedule excluded, combine included; graph_us: per call of a CUDA graph of 20 "
    "back-to-back "
    "calls, schedule_us the same of the schedule; host_us: host time per call over 1000 unsynchronised calls "
    "in batches; gbps counts q, the KV of "
    "every "
    "request once, and out; gflops are not discounted for causal; variable lengths are normal with a "
    "deviation of "
    "half their mean, scaled to that mean";

/// Geometric means over the rows that have something to compare with.
struct Summary {
  int rows = 0, over_best = 0, compared_with_best = 0, compared_with_floor = 0, failed = 0;
  double log_best = 0, log_floor = 0;

  void add(const gpu::Row& r) {
    ++rows;
    failed += r.correct ? 0 : 1;
    if (r.shape.best_ms) {
      ++compared_with_best;
      log_best += std::log(r.ms / *r.shape.best_ms);
      over_best += r.ms > *r.shape.best_ms ? 1 : 0;
    }
    if (r.shape.floor_ms) {
      ++compared_with_floor;
      log_floor += std::log(r.ms / *r.shape.floor_ms);
    }
  }
  double over_best_mean() const { return std::exp(log_best / compared_with_best); }
  double over_floor_mean() const { return std::exp(log_floor / compared_with_floor); }
};

std::string ratio(double ms, const std::optional<double>& to) {
  return to ? fmt::format("{:.2f}", ms / *to) : "-";
}

std::vector<std::string> table_row(const gpu::Row& r) {
  return {r.shape.name,
          fmt::format("{:.2f}", r.ms * 1e3),
          fmt::format("{:.1f}", r.gflops() / 1e3),
          fmt::format("{:.0f}", r.gbps()),
          ratio(r.ms, r.shape.best_ms),
          ratio(r.ms, r.shape.floor_ms),
          fmt::format("{:.2f}", r.graph_us),
          fmt::format("{:.1f}", r.schedule_us),
          fmt::format("{:.2f}", r.host_us),
          format_bytes(static_cast<double>(r.workspace_bytes)),
          r.correct ? "ok" : "WRONG"};
}

Json optional_ratio(double ms, const std::optional<double>& to) {
  return to ? Json(ms / *to) : Json(nullptr);
}

Json to_json(const gpu::Row& r) {
  const Shape& s = r.shape;
  return {{"name", s.name},
          {"b", s.b},
          {"s_q", s.s_q},
          {"h_q", s.h_q},
          {"h_kv", s.h_kv},
          {"s_k", s.s_k},
          {"tokens", r.tokens},
          {"varlen", s.varlen},
          {"causal", s.causal},
          {"dtype", short_dtype(s.dtype)},
          {"page_size", s.page_size},
          {"reps", r.reps},
          {"ms", r.ms},
          {"ms_least", r.ms_least},
          {"gflops", r.gflops()},
          {"gbps", r.gbps()},
          {"graph_us", r.graph_us},
          {"schedule_us", r.schedule_us},
          {"host_us", r.host_us},
          {"best_ms", s.best_ms ? Json(*s.best_ms) : Json(nullptr)},
          {"floor_ms", s.floor_ms ? Json(*s.floor_ms) : Json(nullptr)},
          {"over_best", optional_ratio(r.ms, s.best_ms)},
          {"over_floor", optional_ratio(r.ms, s.floor_ms)},
          {"peers_ms", s.peers_ms},
          {"workspace_bytes", r.workspace_bytes},
          {"max_abs_error", r.max_abs_error},
          {"correct", r.correct}};
}

Json to_json(const gpu::FirstCall& f) {
  return {{"context_ms", f.context_ms},
          {"schedule_ms", f.schedule_ms},
          {"decode_ms", f.decode_ms},
          {"second_schedule_ms", f.second_schedule_ms},
          {"second_decode_ms", f.second_decode_ms}};
}

Json to_json(const Summary& s) {
  Json json = {{"rows", s.rows},
               {"failed", s.failed},
               {"geometric_mean_over_best", nullptr},
               {"geometric_mean_over_floor", nullptr},
               {"rows_over_best", nullptr}};
  if (s.compared_with_best > 0) {
    json["geometric_mean_over_best"] = s.over_best_mean();
    json["rows_over_best"] = s.over_best;
  }
  if (s.compared_with_floor > 0) json["geometric_mean_over_floor"] = s.over_floor_mean();
  return json;
}

void print_summary(const Summary& s) {
  if (s.compared_with_best > 0) {
    fmt::print("geometric mean over best: {:.3f}; {} of {} rows over best\n", s.over_best_mean(), s.over_best,
               s.compared_with_best);
  }
  if (s.compared_with_floor > 0) fmt::print("geometric mean over floor: {:.3f}\n", s.over_floor_mean());
  fmt::print("{} of {} shapes correct\n", s.rows - s.failed, s.rows);
}

}  // namespace

std::string why_no_gpu(const std::vector<Shape>& shapes) {
  std::string why = gpu::why_unusable();
  for (const Shape& shape : shapes) {
    const std::string reason = why_not_sm90(shape);
    if (why.empty() && !reason.empty()) why = fmt::format("shape {}: {}", shape.name, reason);
  }
  return why;
}

int run_gpu_bench(const GpuBenchOptions& o) {
  const auto progress = [&](const std::string& line) {
    if (!o.quiet) fmt::print(stderr, "bench: {}\n", line);
  };
  // First of all, since it is the process's first use of the GPU that is measured.
  const gpu::FirstCall first = gpu::measure_first_call();
  const gpu::Device device = gpu::device();
  progress("measuring the GPU's limits");
  const gpu::Limits limits = gpu::measure_limits();

  Summary summary;
  std::vector<gpu::Row> rows;
  for (const Shape& shape : o.shapes) {
    progress(fmt::format("{} of {}: {}", rows.size() + 1, o.shapes.size(), shape.name));
    // Another seed for every row, so that no row's check repeats another's.
    rows.push_back(gpu::measure_row(shape, {o.reps, o.seed + rows.size()}));
    summary.add(rows.back());
  }

  fmt::print("{}, driver {}, CUDA {}; cold; commit {}\n", device.name, device.driver, device.cuda, commit());
  Table table({"shape", "us", "TFLOP/s", "GB/s", "over best", "over floor", "graph us", "schedule us",
               "host us", "workspace", "check"});
  for (const gpu::Row& row : rows) table.add(table_row(row));
  fmt::print("\n{}\n", table.str());
  for (const gpu::Row& row : rows) {
    if (!row.correct) fmt::print("WRONG: {}: {}\n", row.shape.name, row.failure);
  }
  print_summary(summary);
  fmt::print("{}\n", limits_line(limits));
  fmt::print(
      "first call: context {:.0f} ms, schedule {:.2f} ms, decode {:.2f} ms; second: {:.3f} and {:.3f} ms\n",
      first.context_ms, first.schedule_ms, first.decode_ms, first.second_schedule_ms, first.second_decode_ms);

  if (!o.json.empty()) {
    Json json = gpu_report(device, kProtocol);
    json["seed"] = o.seed;
    json["limits"] = to_json(limits);
    json["first_call"] = to_json(first);
    json["summary"] = to_json(summary);
    json["rows"] = Json::array();
    for (const gpu::Row& row : rows) json["rows"].push_back(to_json(row));
    write_json(o.json, json);
    fmt::print("wrote {}\n", o.json);
  }
  return summary.failed == 0 ? 0 : 1;
}

}  // namespace flash_mla::bench
