#pragma once

// Random problems of attention with keys and values of its own and of rows, in the GPU's memory.

#include <cstdint>
#include <memory>

#include "bench/gpu/case_problem.h"
#include "bench/shelf_case.h"

namespace flash_mla::bench::gpu {

/// Both throw Unsupported where the library has no kernel for the case, std::runtime_error where the GPU has too little memory.
std::unique_ptr<CaseProblem> make_shelf_attention(const ShelfCase& shape, std::uint64_t seed,
                                                  const Stream& stream);
std::unique_ptr<CaseProblem> make_shelf_rows(const ShelfCase& shape, std::uint64_t seed,
                                             const Stream& stream);

}  // namespace flash_mla::bench::gpu
