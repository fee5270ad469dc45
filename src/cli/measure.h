#pragma once

// Timing of one shape, shared by bench and demo.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/blas.h"
#include "cli/limits.h"
#include "cli/problem.h"

namespace flash_mla::cli {

/// A line of the benchmark: a shape, before any data exists.
struct Shape {
  std::string name;
  int b = 4;
  int s_q = 1;
  int h_q = 128;
  int h_kv = 1;
  int s_k = 4096;
  bool varlen = false;  ///< lengths as draw_lengths says; s_k is their mean
  bool causal = false;
  DType dtype = DType::kBFloat16;
  int page_size = 64;

  ProblemSpec problem(std::uint64_t seed) const;
};

/// The limits of `integer_between` and of preset values.
struct ShapeLimits {
  static constexpr int kMaxBatch = 65536, kMaxQueries = 64, kMaxHeads = 1024, kMaxKvHeads = 256;
  static constexpr int kMaxTokens = 4 << 20, kMaxPage = 256, kMaxThreads = 4096;
};

/// A preset file: what to measure.
struct Preset {
  std::vector<Shape> shapes;
  std::vector<int> threads;  ///< empty: not said
};

/// Reads bench/presets/*.json. Throws UsageError naming the file, the shape and the key.
Preset read_preset(const std::string& path);

/// Throws UsageError when h_q is not a multiple of h_kv.
void check_shape(const Shape& shape);

struct Timing {
  double median = 0, best = 0;  ///< seconds
  int reps = 0;
};

struct MeasureOptions {
  int reps = 10;             ///< at least
  double min_seconds = 0.5;  ///< of repetitions, at least
  bool cold = false;         ///< evict the caches before every repetition
};

/// One row of the result file.
struct Row {
  Shape shape;
  std::int64_t tokens = 0;
  int threads = 1;
  bool cold = false;
  double flop = 0, bytes = 0;
  Timing time;
  Timing sgemm;  ///< reps == 0: not measured
  Limits limits;
  std::size_t workspace_bytes = 0;
  std::size_t peak_rss_bytes = 0;  ///< of the process while ours ran: inputs, outputs and workspace

  double gflops() const { return flop / time.median / 1e9; }
  double gbps() const { return bytes / time.median / 1e9; }
  double sgemm_gflops() const { return flop / sgemm.median / 1e9; }
  double limit_fraction() const { return limits.seconds(shape.dtype, flop, bytes) / time.median; }
  bool memory_bound() const;
};
nlohmann::ordered_json to_json(const Row& row);

/// Measures our decode, and `blas` (may be null) on the same two matrix products, in alternating rounds so
/// that both see the same machine.
Row measure_shape(const Shape& shape, const Problem& problem, const Limits& limits, const Blas* blas,
                  const MeasureOptions& options);

}  // namespace flash_mla::cli
