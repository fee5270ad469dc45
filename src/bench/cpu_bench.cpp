#include "bench/cpu_bench.h"

#include <fmt/format.h>

#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/blas.h"
#include "bench/dtype.h"
#include "bench/machine.h"
#include "bench/table.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::ordered_json;

const char* plural(int count) { return count == 1 ? "" : "s"; }

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

class CpuBench {
 public:
  explicit CpuBench(const CpuBenchOptions& options) : o_(options), threads_(options.threads) {
    if (threads_.empty()) threads_ = {machine().usable_cpus};
    if (o_.blas) blas_ = Blas::load(o_.blas_library, o_.blas_core, why_no_blas_);
    if (!blas_ && !o_.blas_library.empty()) {
      throw InvalidArgument(fmt::format("--blas: {}", why_no_blas_));
    }
  }

  Json run() {
    measure();
    print();
    return report();
  }

 private:
  void progress(const std::string& line) const {
    if (!o_.quiet) fmt::print(stderr, "bench: {}\n", line);
  }

  void measure() {
    for (const int t : threads_) {
      if (limits_.count(t) != 0) continue;
      progress(fmt::format("measuring the machine's limits with {} thread{}", t, plural(t)));
      limits_[t] = measure_limits(t);
    }
    const std::size_t total = o_.shapes.size() * threads_.size();
    for (const Shape& shape : o_.shapes) {
      const Problem problem(shape.problem(o_.seed));
      for (const int t : threads_) {
        progress(fmt::format("{} of {}: {}, {} thread{}", rows_.size() + 1, total, shape.name, t, plural(t)));
        rows_.push_back(measure_shape(shape, problem, limits_[t], blas_ ? &*blas_ : nullptr, o_.measure));
      }
    }
  }

  void print() const {
    fmt::print("{}, {}; {}, commit {}\n", machine().cpu, cpu_isa().selected,
               o_.measure.cold ? "cold" : "warm", commit());
    Table table({"shape", "b", "s_q", "h_q", "s_k", "dtype", "threads", "ms", "GFLOP/s", "GB/s", "sgemm",
                 "ratio", "of limit", "workspace", "peak RSS"});
    for (const Row& row : rows_) table.add(table_row(row));
    fmt::print("\n{}\n", table.str());
    for (const auto& [t, l] : limits_) {
      fmt::print("machine limit, {} thread{}: read {:.1f} GB/s, fp32 {:.0f} GFLOP/s{}\n", t, plural(t),
                 l.read_gbps, l.fp32_gflops,
                 l.bf16_gflops > 0 ? fmt::format(", bf16 dot products {:.0f} GFLOP/s", l.bf16_gflops) : "");
    }
    fmt::print("sgemm: {}\n", blas_ ? "GFLOP/s of " + blas_->description() + " on the two matrix products"
                                    : "not measured: " + why_no_blas_);
    fmt::print("{} caches: {}\n", o_.measure.cold ? "cold" : "warm",
               o_.measure.cold
                   ? "evicted before every repetition"
                   : "repetitions follow each other, so a KV cache smaller than the last-level cache "
                     "stays there");
  }

  Json report() const {
    Json report = report_head();
    report["seed"] = o_.seed;
    report["blas"] = blas_ ? Json(blas_->description()) : Json(nullptr);
    report["limits"] = Json::array();
    for (const int t : threads_) report["limits"].push_back(to_json(limits_.at(t)));
    report["rows"] = Json::array();
    for (const Row& row : rows_) report["rows"].push_back(to_json(row));
    return report;
  }

  const CpuBenchOptions& o_;
  std::vector<int> threads_;
  std::optional<Blas> blas_;
  std::string why_no_blas_ = "switched off by --no-blas";
  std::map<int, Limits> limits_;
  std::vector<Row> rows_;
};

}  // namespace

Json run_cpu_bench(const CpuBenchOptions& options) { return CpuBench(options).run(); }

}  // namespace flash_mla::bench
