#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "bench/gpu/sparse.h"
#include "bench/sparse_case.h"

namespace flash_mla::bench {

struct SparseBenchOptions {
  SparsePreset preset;
  int reps = 30;
  std::uint64_t seed = 0;
  std::string json;  ///< file to write, or ""
  bool quiet = false;
};

/// The table of the rows, and below it what was wrong or is not in this build.
std::string sparse_table(const std::vector<gpu::SparseRow>& rows, const Rates& rates);

/// A row of the result file.
nlohmann::ordered_json sparse_json(const gpu::SparseRow& row, const Rates& rates);

/// Measures the cases on the GPU and prints them. Returns the process's exit code: 1 if a check failed. A case
/// that the library has no kernel for is reported and is no failure.
int run_sparse_bench(const SparseBenchOptions& options);

}  // namespace flash_mla::bench
