#pragma once

#include <string>
#include <vector>

#include "bench/preset.h"

namespace flash_mla::bench {

struct GpuBenchOptions {
  std::vector<Shape> shapes;
  int reps = 30;
  std::uint64_t seed = 0;
  std::string json;  ///< file to write, or ""
  bool quiet = false;
};

/// Why these shapes cannot be measured on a GPU here, or "".
std::string why_no_gpu(const std::vector<Shape>& shapes);

/// Measures the shapes on the GPU and prints them. Returns the process's exit code: 1 if a check failed.
int run_gpu_bench(const GpuBenchOptions& options);

}  // namespace flash_mla::bench
