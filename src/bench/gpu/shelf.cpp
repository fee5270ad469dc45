#include "bench/gpu/shelf.h"

#include <algorithm>

#include "bench/gpu/shelf_problem.h"

namespace flash_mla::bench::gpu {

ShelfRow measure_shelf(const ShelfCase& shape, const RowOptions& options) {
  // A TFLOP or so takes over a millisecond; there ten calls say as much.
  constexpr double kLongFlop = 2e12;
  constexpr int kLongReps = 10;
  ShelfRow row;
  row.shape = shape;
  measure_case(
      row,
      [&](const Stream& stream) {
        return shape.attention() ? make_shelf_attention(shape, options.seed, stream)
                                 : make_shelf_rows(shape, options.seed, stream);
      },
      shape.attention() ? 0 : shape.bytes(),
      shape.flop() > kLongFlop ? std::min(kLongReps, options.reps) : options.reps);
  return row;
}

}  // namespace flash_mla::bench::gpu
