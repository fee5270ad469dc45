#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "bench/measure.h"
#include "bench/preset.h"

namespace flash_mla::bench {

struct CpuBenchOptions {
  std::vector<Shape> shapes;
  std::vector<int> threads;  ///< each shape with each; empty: all processors
  bool blas = true;          ///< measure sgemm too
  std::string blas_library;  ///< as Blas::load
  std::string blas_core;
  std::uint64_t seed = 0;
  MeasureOptions measure;
  bool quiet = false;
};

/// Measures the shapes on the CPU and prints them. Returns the result file's content. Throws InvalidArgument
/// when `blas_library` is given and cannot be loaded.
nlohmann::ordered_json run_cpu_bench(const CpuBenchOptions& options);

}  // namespace flash_mla::bench
