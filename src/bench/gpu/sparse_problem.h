#pragma once

// Random problems of sparse attention and FP8 caches in the GPU's memory.

#include <cstdint>
#include <memory>

#include "bench/gpu/case_problem.h"
#include "bench/sparse_case.h"

namespace flash_mla::bench::gpu {

/// Throws Unsupported where the library has no kernel for the case, std::runtime_error where the GPU has too
/// little memory.
std::unique_ptr<CaseProblem> make_sparse_problem(const SparseCase& shape, std::uint64_t seed,
                                                 const Stream& stream);

/// Of kSparseDecode, kSparsePrefill and kDenseFp8Decode.
std::unique_ptr<CaseProblem> make_attention_problem(const SparseCase& shape, std::uint64_t seed,
                                                    const Stream& stream);
std::unique_ptr<CaseProblem> make_append_problem(const SparseCase& shape, std::uint64_t seed,
                                                 const Stream& stream);
std::unique_ptr<CaseProblem> make_merge_problem(const SparseCase& shape, std::uint64_t seed,
                                                const Stream& stream);

}  // namespace flash_mla::bench::gpu
