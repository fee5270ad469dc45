#pragma once

// The benchmark of attention and its neighbours on a GPU. Free of CUDA headers; implemented by shelf.cpp and what it uses, or
// by not_built.cpp in a build without CUDA.

#include "bench/gpu/bench.h"
#include "bench/gpu/case_row.h"
#include "bench/shelf_case.h"

namespace flash_mla::bench::gpu {

struct ShelfRow : CaseRow {
  ShelfCase shape;
};

/// Checks the output (sampled rows of attention in fp32, the rest against the CPU's), then takes the times, whatever the check
/// said. Throws std::runtime_error where the GPU has too little memory.
ShelfRow measure_shelf(const ShelfCase& shape, const RowOptions& options);

}  // namespace flash_mla::bench::gpu
