// The GPU benchmark of a build without CUDA: it refuses every shape.

#include <stdexcept>

#include "bench/gpu/shelf.h"
#include "bench/gpu/sparse.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr const char* kReason = "this build has no CUDA (FLASH_MLA_CUDA=OFF)";

[[noreturn]] void refuse() { throw std::runtime_error(kReason); }

}  // namespace

std::string why_unusable() { return kReason; }
Device device() { refuse(); }
FirstCall measure_first_call() { refuse(); }
Limits measure_limits() { refuse(); }
Row measure_row(const Shape&, const RowOptions&) { refuse(); }
ShelfRow measure_shelf(const ShelfCase&, const RowOptions&) { refuse(); }
SparseRow measure_sparse(const SparseCase&, const RowOptions&) { refuse(); }

}  // namespace flash_mla::bench::gpu
