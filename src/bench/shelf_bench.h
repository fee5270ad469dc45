#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "bench/gpu/shelf.h"

namespace flash_mla::bench {

struct ShelfBenchOptions {
  std::vector<ShelfCase> calls;
  int reps = 30;
  std::uint64_t seed = 0;
  std::string json;  ///< file to write, or ""
  bool quiet = false;
};

/// The table of the rows, and below it what was wrong or is not in this build. `rates` are those of the process.
std::string shelf_table(const std::vector<gpu::ShelfRow>& rows, const Rates& rates);

/// A row of the result file.
nlohmann::ordered_json shelf_json(const gpu::ShelfRow& row, const Rates& rates);

/// Measures the calls on the GPU and prints them, beside floors that follow from rates measured in the same process. Returns the
/// process's exit code: 1 if a check failed. A call that the library has no kernel for is reported and is no failure.
int run_shelf_bench(const ShelfBenchOptions& options);

}  // namespace flash_mla::bench
