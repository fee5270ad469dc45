#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "cli/args.h"
#include "cli/commands.h"
#include "bench/compare.h"
#include "cli/demo_text.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/plot.h"
#include "bench/table.h"
#include "flash_mla/info.h"
#include "flash_mla/reference.h"

namespace flash_mla::cli {
namespace {

struct DemoOptions {
  bool quick = false;
  std::string out = "out", plot, python = "python3", model;
};

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

bool run_demo(const DemoOptions& o) {
  std::filesystem::create_directories(o.out);
  const std::string json = (std::filesystem::path(o.out) / "roofline.json").string();
  const std::string picture =
      !o.plot.empty() ? o.plot : (std::filesystem::path(o.out) / "roofline.png").string();
  require_plotting(o.python);

  const Shape shape = demo_shape(o.quick);
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

  const Limits limits = measure_limits(machine().usable_cpus, o.quick ? 0.1 : 0.3);
  MeasureOptions measure;
  measure.reps = o.quick ? 3 : 10;
  measure.min_seconds = o.quick ? 0.1 : 1.0;
  fmt::print(stderr, "demo: decoding\n");
  const Row row = measure_shape(shape, problem, limits, nullptr, measure);
  fmt::print(stderr, "demo: verifying against the fp64 reference\n");
  const Verified verified = verify_sample(problem, o.quick ? 0.5 : 5.0);

  Table table({"what", "value"});
  table.add(
      {"time of the step", fmt::format("{:.3f} ms (median of {})", row.time.median * 1e3, row.time.reps)});
  table.add({"arithmetic", fmt::format("{:.1f} GFLOP/s", row.gflops())});
  table.add({"traffic (q, KV once, out)", fmt::format("{:.2f} GB/s", row.gbps())});
  table.add({"machine, " + std::to_string(row.threads) + (row.threads == 1 ? " thread" : " threads"),
             fmt::format("{:.0f} GFLOP/s {}, {:.1f} GB/s", limits.peak_gflops(shape.dtype),
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

  nlohmann::ordered_json report = report_head();
  report["limits"] = {to_json(limits)};
  report["rows"] = {to_json(row)};
  report["verified"] = {{"ok", verified.result.ok},
                        {"rows", verified.rows},
                        {"of_rows", verified.all_rows},
                        {"out_max_abs", verified.result.out_max_abs},
                        {"lse_max_abs", verified.result.lse_max_abs}};
  write_json(json, report);
  plot_roofline(o.python, json, picture);
  fmt::print("Wrote {} and {}.\n", json, picture);
  const bool wrote = o.model.empty() || demo_text(o.model, std::filesystem::path(o.out) / "text.txt");
  return verified.result.ok && wrote;
}

}  // namespace

void register_demo(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<DemoOptions>();
  CLI::App* sub = app.add_subcommand(
      "demo", "Decode a realistic batch, verify it, and show how close to the machine's limit it ran");
  sub->add_flag("--quick", o->quick, "A small batch, for a first look or a test");
  sub->add_option("--out", o->out, "Folder for roofline.json, roofline.png and text.txt")
      ->capture_default_str();
  sub->add_option("--plot", o->plot, "Write the picture here instead");
  sub->add_option("--model", o->model,
                  "Hugging Face model directory: afterwards, let this model write a text")
      ->check(CLI::ExistingDirectory);
  sub->add_option("--python", o->python, "Python with matplotlib")->capture_default_str();
  sub->callback([o, &exit_code] { exit_code = run_demo(*o) ? 0 : 1; });
}

}  // namespace flash_mla::cli
