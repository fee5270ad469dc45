#pragma once

// Measured efficiencies from benchmark rows of decode attention.
//
// One call is predicted as max(FLOP / (peak * attention_compute), bytes / (bandwidth * attention_memory)) +
// attention_launch: two fractions and a fixed cost, fitted to the logarithms of the measured times.

#include <string>
#include <vector>

#include "flash_mla/planner.h"
#include "planner/read.h"

namespace flash_mla::planner {

struct BenchRow {
  std::int64_t b, s_q, h_q, h_kv, s_k;
  std::string dtype;  ///< of the cache: bf16, or fp8 for the 656-byte layout; others are read but not fitted
  double ms;
};

/// Rows of a benchmark result, {"machine", "commit", "command", "rows": [...]}.
std::vector<BenchRow> read_bench(const Json& json, const std::string& source);

double attention_flop(const BenchRow& row);
double attention_bytes(const BenchRow& row);
/// Seconds of one decode-attention call.
double predict_attention(const BenchRow& row, const Hardware& hardware, const Efficiency& efficiency);
/// The fit; deterministic. Needs at least 3 rows.
Efficiency fit_attention(const std::vector<BenchRow>& rows, const Hardware& hardware);

/// A result by path, by shipped name, or as it is; `name` is what errors call it.
Json read_source(const Json& one, std::string& name);
/// A hardware profile without efficiencies.
Json measured_profile(const Hardware& hardware);
/// Median and largest of relative errors; at least one.
Json summarize(std::vector<double> errors);

/// The "calibrate" command.
Json run_calibrate(const Json& request);

}  // namespace flash_mla::planner
