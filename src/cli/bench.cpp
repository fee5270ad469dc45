#include <fmt/format.h>

#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench/cpu_bench.h"
#include "bench/dtype.h"
#include "bench/explain.h"
#include "bench/gpu_bench.h"
#include "bench/machine.h"
#include "bench/preset.h"
#include "bench/shelf_bench.h"
#include "bench/sparse_bench.h"
#include "cli/args.h"
#include "cli/commands.h"
#include "cli/plot.h"
#include "flash_mla/error.h"

// `flash-mla bench`: which shapes, on which device; the measuring is src/bench's.

namespace flash_mla::cli {
namespace {

struct BenchOptions {
  std::string device = "auto", preset, only, json, plot, python = "python3", blas_library, blas_core;
  std::vector<int> b{4}, s_q{1}, h_q{128}, h_kv{1}, s_k{4096}, page_size{64}, threads;
  std::vector<std::string> dtype{"bf16"};
  bool varlen = false, causal = false, no_blas = false, quiet = false, explain = false;
  std::uint64_t seed = 0;
  bench::MeasureOptions measure;
  /// The first flag given that only the CPU benchmark takes, or "".
  std::string cpu_flag;
  bool reps_given = false;
};

// Every combination of the lists.
std::vector<bench::Shape> shapes_of_flags(const BenchOptions& o) {
  std::vector<bench::Shape> shapes;
  for (const int b : o.b)
    for (const int s_q : o.s_q)
      for (const int h_q : o.h_q)
        for (const int h_kv : o.h_kv)
          for (const int s_k : o.s_k)
            for (const int page_size : o.page_size)
              for (const std::string& dtype : o.dtype) {
                bench::Shape s{
                    "", b, s_q, h_q, h_kv, s_k, o.varlen, o.causal, bench::parse_dtype(dtype), page_size};
                bench::check_shape(s);
                shapes.push_back(std::move(s));
              }
  return shapes;
}

bench::Preset preset_of(const BenchOptions& o) {
  bench::Preset preset;
  if (!o.preset.empty()) {
    preset = bench::read_preset(o.preset);
  } else {
    preset.shapes = shapes_of_flags(o);
  }
  for (bench::Shape& shape : preset.shapes) {
    if (shape.name.empty()) shape.name = bench::default_name(shape);
  }
  const auto other = [&](const bench::Shape& s) { return s.name.find(o.only) == std::string::npos; };
  std::erase_if(preset.shapes, other);
  if (preset.shapes.empty()) {
    throw InvalidArgument(fmt::format("--only is \"{}\", which no shape's name contains", o.only));
  }
  return preset;
}

bool takes_gpu(const BenchOptions& o, const bench::Preset& preset) {
  if (o.device == "cpu") return false;
  if (o.device == "cuda") {
    if (!o.cpu_flag.empty()) {
      throw InvalidArgument(fmt::format("{} is for --device cpu, but --device is cuda", o.cpu_flag));
    }
    const std::string why = bench::why_no_gpu(preset.shapes);
    if (!why.empty()) throw InvalidArgument(fmt::format("--device cuda: {}", why));
    return true;
  }
  // A preset that names threads is made for CPUs.
  if (!o.cpu_flag.empty() || !preset.threads.empty() || preset.device == "cpu") return false;
  const std::string why = bench::why_no_gpu(preset.shapes);
  if (!why.empty() && preset.device == "cuda") {
    throw InvalidArgument(fmt::format(
        "preset {} is made for a GPU: {}; --device cpu measures its shapes on the CPU", o.preset, why));
  }
  return why.empty();
}

void measure_on_cpu(const BenchOptions& o, bench::Preset preset) {
  if (!o.plot.empty()) require_plotting(o.python, "the roofline picture");
  bench::CpuBenchOptions options;
  options.shapes = std::move(preset.shapes);
  options.threads = !o.threads.empty() ? o.threads : preset.threads;
  options.blas = !o.no_blas;
  options.blas_library = o.blas_library;
  options.blas_core = o.blas_core;
  options.seed = o.seed;
  options.measure = o.measure;
  options.quiet = o.quiet;
  const nlohmann::ordered_json report = bench::run_cpu_bench(options);
  if (o.json.empty() && o.plot.empty()) return;
  const std::string json = !o.json.empty() ? o.json : o.plot + ".json";
  bench::write_json(json, report);
  fmt::print("wrote {}\n", json);
  if (o.plot.empty()) return;
  plot(o.python, json, o.plot);
  fmt::print("wrote {}\n", o.plot);
}

int measure_on_gpu(const BenchOptions& o, bench::Preset preset) {
  bench::GpuBenchOptions options;
  options.shapes = std::move(preset.shapes);
  if (o.reps_given) options.reps = o.measure.reps;
  options.seed = o.seed;
  options.json = o.json;
  options.quiet = o.quiet;
  return bench::run_gpu_bench(options);
}

/// Takes those of a GPU preset's cases whose names contain --only.
template <class Case>
void keep_only(const BenchOptions& o, std::vector<Case>& cases) {
  std::erase_if(cases, [&](const Case& c) { return c.name.find(o.only) == std::string::npos; });
  if (cases.empty())
    throw InvalidArgument(fmt::format("--only is \"{}\", which no case's name contains", o.only));
}

/// Of a preset that a GPU alone measures: refuses what is not for one.
void require_gpu(const BenchOptions& o) {
  if (o.explain)
    throw InvalidArgument(fmt::format("--explain takes shapes, but preset {} has cases", o.preset));
  const std::string flag = o.device == "cpu" ? "--device cpu" : o.cpu_flag;
  if (!flag.empty()) {
    throw InvalidArgument(fmt::format("{} is for the CPU, but preset {} is made for a GPU", flag, o.preset));
  }
  if (const std::string why = bench::why_no_gpu({}); !why.empty()) {
    throw InvalidArgument(fmt::format("preset {} is made for a GPU: {}", o.preset, why));
  }
}

template <class Options>
Options gpu_case_options(const BenchOptions& o) {
  Options options;
  if (o.reps_given) options.reps = o.measure.reps;
  options.seed = o.seed;
  options.json = o.json;
  options.quiet = o.quiet;
  return options;
}

/// A preset of cases of sparse attention.
int measure_sparse(const BenchOptions& o) {
  auto options = gpu_case_options<bench::SparseBenchOptions>(o);
  options.preset = bench::read_sparse_preset(o.preset);
  keep_only(o, options.preset.cases);
  require_gpu(o);
  return bench::run_sparse_bench(options);
}

/// A preset of calls of attention and its neighbours.
int measure_shelf(const BenchOptions& o) {
  auto options = gpu_case_options<bench::ShelfBenchOptions>(o);
  options.calls = bench::read_shelf_preset(o.preset);
  keep_only(o, options.calls);
  require_gpu(o);
  return bench::run_shelf_bench(options);
}

int run_bench(const BenchOptions& o) {
  if (!o.preset.empty() && bench::is_sparse_preset(o.preset)) return measure_sparse(o);
  if (!o.preset.empty() && bench::is_shelf_preset(o.preset)) return measure_shelf(o);
  bench::Preset preset = preset_of(o);
  if (o.explain) {
    fmt::print("{}", bench::explain(preset.shapes));
    return 0;
  }
  if (takes_gpu(o, preset)) return measure_on_gpu(o, std::move(preset));
  measure_on_cpu(o, std::move(preset));
  return 0;
}

}  // namespace

void register_bench(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App* sub =
      app.add_subcommand("bench",
                         "Speed on random data, beside the machine's limits; on a CPU also beside OpenBLAS, "
                         "on a GPU checked against a reference");
  using L = bench::ShapeLimits;
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
      "h200-dense, h200-sparse (sparse attention and FP8 caches), h200-shelf (prefill, GQA and rows), smoke");
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
