#include "bench/demo.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "bench/compare.h"
#include "bench/dtype.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/table.h"
#include "flash_mla/info.h"
#include "flash_mla/reference.h"

namespace flash_mla::bench {
namespace {

constexpr float kV3Scale = 0.1352338f;

// A decoding step of DeepSeek-V3 (128 heads over one latent) in the middle of serving: lengths from a fresh
// prompt to a long document.
Shape demo_shape(bool quick) {
  Shape shape;
  shape.name = "DeepSeek-V3 decode";
  shape.b = quick ? 4 : 16;
  shape.s_k = quick ? 512 : 4096;
  shape.varlen = true;
  return shape;
}

struct Verified {
  Comparison result;
  std::int64_t rows = 0, all_rows = 0;
};

// The fp64 reference takes about a microsecond per token and head, so only as many heads of each request are
// checked as fit into some seconds; they are spread over all heads and differ between requests.
Verified verify_sample(const Problem& problem, double budget_seconds) {
  const DenseDecodeArgs& args = problem.args();
  const ProblemSpec& spec = problem.spec();
  const double per_head = 1.5e-6 * static_cast<double>(spec.tokens()) * spec.s_q;
  const int heads = std::clamp(static_cast<int>(budget_seconds / per_head), 1, spec.h_q);
  Verified v;
  v.all_rows = spec.batch() * spec.s_q * spec.h_q;
  const Buffer out(sizeof(double) * static_cast<std::size_t>(spec.s_q * spec.d_v));
  const Buffer lse(sizeof(double) * static_cast<std::size_t>(spec.s_q));
  for (std::int64_t r = 0; r < spec.batch(); ++r) {
    for (int i = 0; i < heads; ++i) {
      const std::int64_t head = (std::int64_t{i} * spec.h_q / heads + r) % spec.h_q;
      const DenseDecodeArgs ours = slice_head(args, r, head);
      DenseDecodeArgs ref = ours;
      ref.out = TensorView::contiguous(out.data(), DType::kFloat64, {1, spec.s_q, 1, spec.d_v});
      ref.lse = TensorView::contiguous(lse.data(), DType::kFloat64, {1, 1, spec.s_q});
      reference::dense_decode(ref, problem.options());
      const Comparison c = compare_outputs(ours.out, ours.lse, ref.out, ref.lse, tolerance_for(spec.dtype));
      v.rows += spec.s_q;
      v.result.out_max_abs = std::max(v.result.out_max_abs, c.out_max_abs);
      v.result.lse_max_abs = std::max(v.result.lse_max_abs, c.lse_max_abs);
      if (!c.ok && v.result.ok) {
        v.result.ok = false;
        v.result.failure = fmt::format("request {}, head {}: {}", r, head, c.failure);
      }
    }
  }
  return v;
}

void print_figures(const Row& row, const Verified& verified) {
  const Limits& limits = row.limits;
  Table table({"what", "value"});
  table.add(
      {"time of the step", fmt::format("{:.3f} ms (median of {})", row.time.median * 1e3, row.time.reps)});
  table.add({"arithmetic", fmt::format("{:.1f} GFLOP/s", row.gflops())});
  table.add({"traffic (q, KV once, out)", fmt::format("{:.2f} GB/s", row.gbps())});
  table.add({"machine, " + std::to_string(row.threads) + (row.threads == 1 ? " thread" : " threads"),
             fmt::format("{:.0f} GFLOP/s {}, {:.1f} GB/s", limits.peak_gflops(row.shape.dtype),
                         limits.bf16_gflops > limits.fp32_gflops ? "bf16" : "fp32", limits.read_gbps)});
  table.add(
      {"achieved of the machine's limit", fmt::format("{:.0f}% (bound by {})", 100 * row.limit_fraction(),
                                                      row.memory_bound() ? "memory" : "arithmetic")});
  table.add({"workspace", format_bytes(static_cast<double>(row.workspace_bytes))});
  table.add({"peak memory", format_bytes(static_cast<double>(row.peak_rss_bytes))});
  table.add({"largest error", fmt::format("out {:.1e}, lse {:.1e}", verified.result.out_max_abs,
                                          verified.result.lse_max_abs)});
  fmt::print("{}\n", table.str());
  const std::string sample =
      verified.rows == verified.all_rows
          ? fmt::format("all {} rows", verified.all_rows)
          : fmt::format("a sample of {} of {} rows (every request, heads spread evenly)", verified.rows,
                        verified.all_rows);
  if (verified.result.ok) {
    fmt::print("Verified against the fp64 reference: {}.\n", sample);
  } else {
    fmt::print("WRONG RESULT, checked {}: {}\n", sample, verified.result.failure);
  }
}

}  // namespace

bool run_demo(bool quick, const std::string& json) {
  const Shape shape = demo_shape(quick);
  ProblemSpec spec = shape.problem(/*seed=*/3);
  spec.softmax_scale = kV3Scale;
  const Problem problem(spec);
  const auto [shortest, longest] = std::minmax_element(spec.cache_seqlens.begin(), spec.cache_seqlens.end());
  fmt::print(
      "One decoding step of DeepSeek-V3's attention: {} requests, {} heads over one latent of 512 + 64,\n"
      "{} to {} cached tokens each ({} together), {} in permuted pages of {} tokens.\n",
      shape.b, shape.h_q, *shortest, *longest, spec.tokens(), short_dtype(shape.dtype), shape.page_size);
  const CpuIsaInfo isa = cpu_isa();
  fmt::print("Backend: cpu, {} ({})\n\n", machine().cpu, isa.selected);
  std::fflush(stdout);

  const Limits limits = measure_limits(machine().usable_cpus, quick ? 0.1 : 0.3);
  MeasureOptions measure;
  measure.reps = quick ? 3 : 10;
  measure.min_seconds = quick ? 0.1 : 1.0;
  fmt::print(stderr, "demo: decoding\n");
  const Row row = measure_shape(shape, problem, limits, nullptr, measure);
  fmt::print(stderr, "demo: verifying against the fp64 reference\n");
  const Verified verified = verify_sample(problem, quick ? 0.5 : 5.0);
  print_figures(row, verified);

  nlohmann::ordered_json report = report_head();
  report["limits"] = {to_json(limits)};
  report["rows"] = {to_json(row)};
  report["verified"] = {{"ok", verified.result.ok},
                        {"rows", verified.rows},
                        {"of_rows", verified.all_rows},
                        {"out_max_abs", verified.result.out_max_abs},
                        {"lse_max_abs", verified.result.lse_max_abs}};
  write_json(json, report);
  return verified.result.ok;
}

}  // namespace flash_mla::bench
