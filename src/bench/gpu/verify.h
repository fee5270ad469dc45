#pragma once

// Is the output of a GPU problem right?

#include "bench/compare.h"
#include "bench/gpu/problem.h"

namespace flash_mla::bench::gpu {

/// Compares kSampledRows rows of what the last decode wrote with the reference, and looks for NaN in all of
/// it.
Comparison check_output(const Problem& problem, std::uint64_t seed, const Stream& stream);

}  // namespace flash_mla::bench::gpu
