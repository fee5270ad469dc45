#pragma once

// The benchmark of sparse attention and FP8 caches on a GPU. Free of CUDA headers; implemented by sparse.cpp and
// what it uses, or by not_built.cpp in a build without CUDA.

#include <cstddef>
#include <string>

#include "bench/gpu/bench.h"
#include "bench/sparse_case.h"

namespace flash_mla::bench::gpu {

struct SparseRow {
  SparseCase shape;
  /// What the library said where it has no kernel for the case: nothing was measured. "" otherwise.
  std::string not_in_build;
  int reps = 0;
  double us = 0;        ///< median, cold L2: what the caller waits for, a launch included
  double us_least = 0;  ///< the quickest
  double graph_us = 0;  ///< per call of a CUDA graph of 20 back-to-back calls
  double host_us = 0;   ///< what a call takes the host; 0: not measured, for calls of over half a millisecond
  double copy_us = 0;   ///< where SparseCase::copies(): a copy of as many bytes, timed as `us`
  double copy_graph_us = 0;  ///< and as graph_us
  std::size_t workspace_bytes = 0;
  bool correct = false;
  std::string failure;  ///< what is wrong first, or ""
  double max_abs_error = 0;

  bool measured() const { return not_in_build.empty(); }
};

/// Checks the output (sampled rows of attention and of merge_states in float64, appended tokens byte for byte against
/// the CPU's), then takes the times, whatever the check said. Throws std::runtime_error where the GPU has too
/// little memory.
SparseRow measure_sparse(const SparseCase& shape, const RowOptions& options);

}  // namespace flash_mla::bench::gpu
