#include "bench/gpu/bench.h"

#include <fmt/format.h>

#include <limits>
#include <map>
#include <memory>

#include "cli/args.h"
#include "cli/commands.h"
#include "bench/explain.h"
#include "bench/gpu_bench.h"
#include "bench/machine.h"
#include "bench/measure.h"
#include "bench/plot.h"
#include "bench/table.h"
#include "flash_mla/info.h"

namespace flash_mla::cli {
namespace {

struct BenchOptions {
  std::string device = "auto", preset, only, json, plot, python = "python3", blas_library, blas_core;
  std::vector<int> b{4}, s_q{1}, h_q{128}, h_kv{1}, s_k{4096}, page_size{64}, threads;
  std::vector<std::string> dtype{"bf16"};
  bool varlen = false, causal = false, no_blas = false, quiet = false, explain = false;
  std::uint64_t seed = 0;
  MeasureOptions measure;
  /// The first flag given that only the CPU benchmark takes, or "".
  std::string cpu_flag;
  bool reps_given = false;
};

// Every combination of the lists.
std::vector<Shape> shapes_of_flags(const BenchOptions& o) {
  std::vector<Shape> shapes;
  for (const int b : o.b)
    for (const int s_q : o.s_q)
      for (const int h_q : o.h_q)
        for (const int h_kv : o.h_kv)
          for (const int s_k : o.s_k)
            for (const int page_size : o.page_size)
              for (const std::string& dtype : o.dtype) {
                Shape s{"", b, s_q, h_q, h_kv, s_k, o.varlen, o.causal, parse_dtype(dtype), page_size};
                check_shape(s);
                shapes.push_back(std::move(s));
              }
  return shapes;
}

std::string default_name(const Shape& s) {
  std::string name = fmt::format("b{} h{} s{} {}", s.b, s.h_q, s.s_k, short_dtype(s.dtype));
  if (s.s_q != 1) name += fmt::format(" sq{}", s.s_q);
  if (s.h_kv != 1) name += fmt::format(" hkv{}", s.h_kv);
  if (s.page_size != 64) name += fmt::format(" page{}", s.page_size);
  if (s.varlen) name += " varlen";
  if (s.causal) name += " causal";
  return name;
}

std::vector<std::string> table_row(const Row& r) {
  const bool blas = r.sgemm.reps > 0;
  return {r.shape.name,
          fmt::format("{}", r.shape.b),
          fmt::format("{}", r.shape.s_q),
          fmt::format("{}", r.shape.h_q),
          fmt::format("{}", r.shape.s_k),
          short_dtype(r.shape.dtype),
          fmt::format("{}", r.threads),
          fmt::format("{:.3f}", r.time.median * 1e3),
          fmt::format("{:.1f}", r.gflops()),
          fmt::format("{:.2f}", r.gbps()),
          blas ? fmt::format("{:.1f}", r.sgemm_gflops()) : "-",
          blas ? fmt::format("{:.2f}", r.gflops() / r.sgemm_gflops()) : "-",
          fmt::format("{:.0f}% {}", 100 * r.limit_fraction(), r.memory_bound() ? "mem" : "flop"),
          format_bytes(static_cast<double>(r.workspace_bytes)),
          format_bytes(static_cast<double>(r.peak_rss_bytes))};
}

Preset preset_of(const BenchOptions& o) {
  Preset preset;
  if (!o.preset.empty()) {
    preset = read_preset(o.preset);
  } else {
    preset.shapes = shapes_of_flags(o);
  }
  for (Shape& shape : preset.shapes) {
    if (shape.name.empty()) shape.name = default_name(shape);
  }
  const auto other = [&](const Shape& s) { return s.name.find(o.only) == std::string::npos; };
  std::erase_if(preset.shapes, other);
  if (preset.shapes.empty()) {
    throw UsageError(fmt::format("--only is \"{}\", which no shape's name contains", o.only));
  }
  return preset;
}

// Why these shapes cannot be measured on a GPU here, or "".
std::string why_no_gpu(const Preset& preset) {
  std::string why = gpu::why_unusable();
  for (const Shape& shape : preset.shapes) {
    const std::string reason = why_not_sm90(shape);
    if (why.empty() && !reason.empty()) why = fmt::format("shape {}: {}", shape.name, reason);
  }
  return why;
}

bool takes_gpu(const BenchOptions& o, const Preset& preset) {
  if (o.device == "cpu") return false;
  if (o.device == "cuda") {
    if (!o.cpu_flag.empty()) {
      throw UsageError(fmt::format("{} is for --device cpu, but --device is cuda", o.cpu_flag));
    }
    const std::string why = why_no_gpu(preset);
    if (!why.empty()) throw UsageError(fmt::format("--device cuda: {}", why));
    return true;
  }
  // A preset that names threads is made for CPUs.
  if (!o.cpu_flag.empty() || !preset.threads.empty() || preset.device == "cpu") return false;
  const std::string why = why_no_gpu(preset);
  if (!why.empty() && preset.device == "cuda") {
    throw UsageError(fmt::format(
        "preset {} is made for a GPU: {}; --device cpu measures its shapes on the CPU", o.preset, why));
  }
  return why.empty();
}

void run_cpu_bench(const BenchOptions& o, Preset preset) {
  std::vector<int> threads = !o.threads.empty() ? o.threads : preset.threads;
  if (threads.empty()) threads = {machine().usable_cpus};
  if (!o.plot.empty()) require_plotting(o.python);
  const auto progress = [&](const std::string& line) {
    if (!o.quiet) fmt::print(stderr, "bench: {}\n", line);
  };

  std::string why = "switched off by --no-blas";
  std::optional<Blas> blas;
  if (!o.no_blas) blas = Blas::load(o.blas_library, o.blas_core, why);
  if (!blas && !o.blas_library.empty()) throw UsageError(fmt::format("--blas: {}", why));

  std::map<int, Limits> limits;
  for (const int t : threads) {
    if (limits.count(t) != 0) continue;
    progress(fmt::format("measuring the machine's limits with {} thread{}", t, t == 1 ? "" : "s"));
    limits[t] = measure_limits(t);
  }
  std::vector<Row> rows;
  const std::size_t total = preset.shapes.size() * threads.size();
  for (Shape& shape : preset.shapes) {
    const Problem problem(shape.problem(o.seed));
    for (const int t : threads) {
      progress(
          fmt::format("{} of {}: {}, {} thread{}", rows.size() + 1, total, shape.name, t, t == 1 ? "" : "s"));
      rows.push_back(measure_shape(shape, problem, limits[t], blas ? &*blas : nullptr, o.measure));
    }
  }

  fmt::print("{}, {}; {}, commit {}\n", machine().cpu, cpu_isa().selected, o.measure.cold ? "cold" : "warm",
             commit());
  Table table({"shape", "b", "s_q", "h_q", "s_k", "dtype", "threads", "ms", "GFLOP/s", "GB/s", "sgemm",
               "ratio", "of limit", "workspace", "peak RSS"});
  for (const Row& row : rows) table.add(table_row(row));
  fmt::print("\n{}\n", table.str());
  for (const auto& [t, l] : limits) {
    fmt::print("machine limit, {} thread{}: read {:.1f} GB/s, fp32 {:.0f} GFLOP/s{}\n", t, t == 1 ? "" : "s",
               l.read_gbps, l.fp32_gflops,
               l.bf16_gflops > 0 ? fmt::format(", bf16 dot products {:.0f} GFLOP/s", l.bf16_gflops) : "");
  }
  fmt::print("sgemm: {}\n", blas ? "GFLOP/s of " + blas->description() + " on the two matrix products"
                                 : "not measured: " + why);
  fmt::print("{} caches: {}\n", o.measure.cold ? "cold" : "warm",
             o.measure.cold
                 ? "evicted before every repetition"
                 : "repetitions follow each other, so a KV cache smaller than the last-level cache "
                   "stays there");

  nlohmann::ordered_json report = report_head();
  report["seed"] = o.seed;
  report["blas"] = blas ? nlohmann::ordered_json(blas->description()) : nlohmann::ordered_json(nullptr);
  report["limits"] = nlohmann::ordered_json::array();
  for (const int t : threads) report["limits"].push_back(to_json(limits[t]));
  report["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : rows) report["rows"].push_back(to_json(row));
  const std::string json = !o.json.empty() ? o.json : o.plot + ".json";
  if (!o.json.empty() || !o.plot.empty()) {
    write_json(json, report);
    fmt::print("wrote {}\n", json);
  }
  if (!o.plot.empty()) {
    plot_roofline(o.python, json, o.plot);
    fmt::print("wrote {}\n", o.plot);
  }
}

int run_bench(const BenchOptions& o) {
  Preset preset = preset_of(o);
  if (o.explain) {
    fmt::print("{}", explain(preset.shapes));
    return 0;
  }
  if (!takes_gpu(o, preset)) {
    run_cpu_bench(o, std::move(preset));
    return 0;
  }
  GpuBenchOptions options;
  options.shapes = std::move(preset.shapes);
  if (o.reps_given) options.reps = o.measure.reps;
  options.seed = o.seed;
  options.json = o.json;
  options.quiet = o.quiet;
  return run_gpu_bench(options);
}

}  // namespace

void register_bench(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App* sub =
      app.add_subcommand("bench",
                         "Speed on random data, beside the machine's limits; on a CPU also beside OpenBLAS, "
                         "on a GPU checked against a reference");
  using L = ShapeLimits;
  const auto list = [&](const char* flag, std::vector<int>& values, int highest, const char* help) {
    return sub->add_option(flag, values, help)
        ->delimiter(',')
        ->check(integer_between(1, highest))
        ->capture_default_str();
  };
  sub->add_option(
         "--device", o->device,
         "auto (the first GPU where it is a Hopper and the shapes suit it, else the CPU), cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  std::vector<CLI::Option*> shape = {
      list("--b", o->b, L::kMaxBatch, "Requests in the batch (a list, like all shape flags: 1,4,16)"),
      list("--s-q", o->s_q, L::kMaxQueries, "Query tokens of each request"),
      list("--h-q", o->h_q, L::kMaxHeads, "Query heads"),
      list("--h-kv", o->h_kv, L::kMaxKvHeads, "Latent heads"),
      list("--s-k", o->s_k, L::kMaxTokens, "Cached tokens of each request (their mean with --varlen)"),
      list("--page-size", o->page_size, L::kMaxPage, "Tokens of a page"),
      sub->add_option("--dtype", o->dtype, "bf16, fp16 or fp32")
          ->delimiter(',')
          ->check(dtype_check())
          ->capture_default_str(),
      sub->add_flag("--varlen", o->varlen, "Draw the lengths around s_k"),
      sub->add_flag("--causal", o->causal, "Bottom-right aligned causal mask (without effect for s_q = 1)")};
  CLI::Option* threads =
      list("--threads", o->threads, L::kMaxThreads, "CPU: thread counts; default: all processors")
          ->default_str("");
  CLI::Option* preset = sub->add_option(
      "--preset", o->preset,
      "Take the shapes from this JSON file, or from the built-in preset of that name: cpu-house, "
      "h200-dense, smoke");
  for (CLI::Option* option : shape) preset->excludes(option);
  sub->add_option("--only", o->only,
                  "Take the shapes whose names, as the table prints them, contain this text");
  CLI::Option* reps =
      sub->add_option("--reps", o->measure.reps,
                      "Repetitions; the median counts. Default: 10 at least on a CPU, 30 on a GPU")
          ->check(integer_between(1, 1'000'000));
  CLI::Option* min_time =
      sub->add_option("--min-time", o->measure.min_seconds, "CPU: seconds of repetitions, at least")
          ->check(number_between(0, 3600))
          ->capture_default_str();
  sub->add_flag("--cold", o->measure.cold, "Evict the caches before every repetition (on a GPU: always)");
  sub->add_option("--seed", o->seed, "Seed of the data and of --varlen's lengths")
      ->check(integer_between(0, std::numeric_limits<long long>::max()))
      ->capture_default_str();
  CLI::Option* blas =
      sub->add_option("--blas", o->blas_library, "CPU: OpenBLAS library to load instead of the system's");
  CLI::Option* blas_core = sub->add_option(
      "--blas-core", o->blas_core,
      "CPU: OpenBLAS kernels, e.g. SkylakeX; default: its own choice for this processor, whatever "
      "OPENBLAS_CORETYPE says");
  CLI::Option* no_blas = sub->add_flag("--no-blas", o->no_blas, "CPU: do not measure sgemm")->excludes(blas);
  sub->add_option("--json", o->json, "Write the results to this file");
  CLI::Option* plot = sub->add_option(
      "--plot", o->plot, "CPU: draw the roofline into this picture (and its data into <picture>.json)");
  sub->add_option("--python", o->python, "Python with matplotlib, for --plot")->capture_default_str();
  sub->add_flag("--explain", o->explain,
                "Measure nothing; print which kernels a Hopper GPU would run the shapes with, and how");
  sub->add_flag("-q,--quiet", o->quiet, "No progress on stderr");
  const std::vector<CLI::Option*> cpu_only{threads, min_time, blas, blas_core, no_blas, plot};
  sub->callback([o, reps, cpu_only, &exit_code] {
    for (const CLI::Option* option : cpu_only) {
      if (option->count() > 0 && o->cpu_flag.empty()) o->cpu_flag = option->get_name();
    }
    o->reps_given = reps->count() > 0;
    exit_code = run_bench(*o);
  });
}

}  // namespace flash_mla::cli
