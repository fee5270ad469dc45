#pragma once

// The benchmark on a GPU. Free of CUDA headers; implemented by the rest of this folder, or by not_built.cpp
// in a build without CUDA.

#include <cstddef>
#include <cstdint>
#include <string>

#include "bench/preset.h"

namespace flash_mla::bench::gpu {

/// Why this program cannot run the sm90 backend here, or "".
std::string why_unusable();

/// The GPU the benchmark runs on: the first.
struct Device {
  std::string name;
  std::string driver;  ///< e.g. "580.159.04"; "unknown" where the system does not say
  std::string cuda;    ///< of the runtime this program is built with, e.g. "13.0"
  int sms = 0;
  std::size_t memory_bytes = 0;
};
Device device();

/// What a process pays once, in milliseconds: the CUDA context, then the first and the second time a schedule
/// is built and a call decodes, each with the wait for its end. Meaningful as the first use of the GPU only.
struct FirstCall {
  double context_ms = 0, schedule_ms = 0, decode_ms = 0, second_schedule_ms = 0, second_decode_ms = 0;
};
FirstCall measure_first_call();

/// Ceilings, measured in this process.
struct Limits {
  double read_gbps = 0;  ///< reading `read_bytes`
  std::size_t read_bytes = 0;
  double copy_gbps = 0;            ///< copying half of them; bytes read and bytes written
  double matmul_gflops = 0;        ///< bf16, 8192 x 8192 x 8192, timed as Row::ms is; 0: not measured
  double matmul_graph_gflops = 0;  ///< the same timed as Row::graph_us, which the power limit slows down
  std::string why_no_matmul;       ///< "" if measured
  std::string matmul_library;      ///< and its version
};
Limits measure_limits();

struct RowOptions {
  int reps = 30;
  std::uint64_t seed = 0;
};

struct Row {
  Shape shape;
  std::int64_t tokens = 0;
  double flop = 0, bytes = 0;
  int reps = 0;
  double ms = 0;           ///< median, cold L2
  double ms_least = 0;     ///< the quickest
  double graph_us = 0;     ///< per call of a CUDA graph of 20 back-to-back calls
  double host_us = 0;      ///< what a call takes the host
  double schedule_us = 0;  ///< building the schedule on the device, per call of such a graph
  std::size_t workspace_bytes = 0;
  bool correct = false;
  std::string failure;  ///< what is wrong first, or ""
  double max_abs_error = 0;

  double gflops() const { return flop / ms / 1e6; }
  double gbps() const { return bytes / ms / 1e6; }
};

/// Checks sampled rows of the output against a reference computed on the GPU, and the whole for NaN; then
/// takes the times, whatever the check said. Throws std::runtime_error where the GPU has too little memory.
Row measure_row(const Shape& shape, const RowOptions& options);

}  // namespace flash_mla::bench::gpu
