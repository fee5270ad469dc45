#pragma once

// The benchmark of sparse attention and FP8 caches on a GPU. Free of CUDA headers; implemented by sparse.cpp and
// what it uses, or by not_built.cpp in a build without CUDA.

#include "bench/gpu/bench.h"
#include "bench/gpu/case_row.h"
#include "bench/sparse_case.h"

namespace flash_mla::bench::gpu {

struct SparseRow : CaseRow {
  SparseCase shape;
};

/// Checks the output (sampled rows of attention and of merge_states in float64, appended tokens byte for byte against
/// the CPU's), then takes the times, whatever the check said. Throws std::runtime_error where the GPU has too
/// little memory.
SparseRow measure_sparse(const SparseCase& shape, const RowOptions& options);

}  // namespace flash_mla::bench::gpu
