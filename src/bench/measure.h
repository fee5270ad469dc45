#pragma once

// Timing of one shape, shared by bench and demo.

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "bench/blas.h"
#include "bench/limits.h"
#include "bench/preset.h"
#include "bench/problem.h"

namespace flash_mla::bench {

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

}  // namespace flash_mla::bench
