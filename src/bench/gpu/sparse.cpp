#include "bench/gpu/sparse.h"

#include "bench/gpu/sparse_problem.h"

namespace flash_mla::bench::gpu {
std::unique_ptr<CaseProblem> make_sparse_problem(const SparseCase& c, std::uint64_t seed,
                                                 const Stream& stream) {
  switch (c.operation) {
    case SparseOperation::kAppend:
      return make_append_problem(c, seed, stream);
    case SparseOperation::kMerge:
      return make_merge_problem(c, seed, stream);
    default:
      return make_attention_problem(c, seed, stream);
  }
}

SparseRow measure_sparse(const SparseCase& shape, const RowOptions& options) {
  SparseRow row;
  row.shape = shape;
  measure_case(
      row, [&](const Stream& stream) { return make_sparse_problem(shape, options.seed, stream); },
      shape.copies() ? shape.bytes() : 0, options.reps);
  return row;
}

}  // namespace flash_mla::bench::gpu
