#pragma once

// Random problems of sparse attention and FP8 caches in the GPU's memory.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "bench/gpu/resources.h"
#include "bench/sparse_case.h"

namespace flash_mla::bench::gpu {

/// One problem: inputs that are random, outputs and workspace that are poison, everything in place.
class SparseProblem {
 public:
  SparseProblem() = default;
  virtual ~SparseProblem() = default;
  SparseProblem(const SparseProblem&) = delete;
  SparseProblem& operator=(const SparseProblem&) = delete;

  /// Queues the operation.
  virtual void call(const Stream& stream) const = 0;
  /// What is wrong with what the last call wrote, "" when nothing; `max_abs_error` of attention and merge.
  virtual std::string wrong(double& max_abs_error, const Stream& stream) const = 0;
  virtual std::size_t workspace_bytes() const { return 0; }
};

/// Throws Unsupported where the library has no kernel for the case, std::runtime_error where the GPU has too
/// little memory.
std::unique_ptr<SparseProblem> make_sparse_problem(const SparseCase& shape, std::uint64_t seed,
                                                   const Stream& stream);

/// Of kSparseDecode, kSparsePrefill and kDenseFp8Decode.
std::unique_ptr<SparseProblem> make_attention_problem(const SparseCase& shape, std::uint64_t seed,
                                                      const Stream& stream);
std::unique_ptr<SparseProblem> make_append_problem(const SparseCase& shape, std::uint64_t seed,
                                                   const Stream& stream);
std::unique_ptr<SparseProblem> make_merge_problem(const SparseCase& shape, std::uint64_t seed,
                                                  const Stream& stream);

/// Throws std::runtime_error where the GPU has less than `bytes` free.
void require_memory(const std::string& name, std::size_t bytes);

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

inline constexpr flash_mla::Device kFirstGpu{DeviceType::kCuda, 0};

}  // namespace flash_mla::bench::gpu
