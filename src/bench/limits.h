#pragma once

// The machine's limits for a roofline, measured rather than looked up: clocks and memory channels differ
// from the data sheet on shared and virtual machines.

#include <nlohmann/json_fwd.hpp>

#include "flash_mla/tensor.h"

namespace flash_mla::bench {

struct Limits {
  int threads = 1;
  double read_gbps = 0;    ///< streaming read of a buffer far larger than the last-level cache
  double fp32_gflops = 0;  ///< independent fp32 fused multiply-adds in registers
  double bf16_gflops = 0;  ///< dot products of bf16 pairs; 0 where the processor has none

  /// The highest rate for inputs of `dtype`.
  double peak_gflops(DType dtype) const;
  /// Shortest possible time for this much work, in seconds.
  double seconds(DType dtype, double flop, double bytes) const;
};

/// Takes about `seconds` per limit on `threads` threads. Throws std::bad_alloc when there is no memory.
Limits measure_limits(int threads, double seconds = 0.2);

nlohmann::ordered_json to_json(const Limits& limits);

}  // namespace flash_mla::bench
