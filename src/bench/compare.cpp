#include "bench/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/element.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

double element(const TensorView& view, std::int64_t offset) {
  return visit_float_type(view.dtype, [&](auto tag) {
    using T = decltype(tag);
    return static_cast<double>(to_float(view.ptr<const T>()[offset]));
  });
}

// Written so that a NaN on either side fails.
bool close(double value, double expected, double abs_tolerance, double rel_tolerance) {
  const double error = std::abs(value - expected);
  return error <= abs_tolerance || error <= rel_tolerance * std::abs(expected);
}

void check_same_shape(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank || !std::equal(a.shape.begin(), a.shape.begin() + a.rank, b.shape.begin())) {
    throw InvalidArgument(fmt::format("compared {} with {}, expected one shape", a.describe(), b.describe()));
  }
}

}  // namespace

Tolerance tolerance_for(DType dtype) {
  constexpr double kLseAbs = 1e-6, kLseRel = 8.01 / 65536;
  switch (dtype) {
    case DType::kBFloat16:
      return {8e-4, 2.01 / 128, 5e-6, kLseAbs, kLseRel};
    case DType::kFloat16:  // three more bits of mantissa than bf16
      return {1e-4, 2.01 / 1024, 5e-7, kLseAbs, kLseRel};
    default:  // what fp32 accumulation over some thousand keys leaves
      return {2e-6, 1e-4, 1e-10, kLseAbs, 1e-5};
  }
}

Comparison compare_outputs(const TensorView& out, const TensorView& lse, const TensorView& ref_out,
                           const TensorView& ref_lse, const Tolerance& tolerance) {
  check_same_shape(out, ref_out);
  check_same_shape(lse, ref_lse);
  Comparison c;
  const auto fail = [&](std::string why) {
    if (c.ok) c.failure = std::move(why);
    c.ok = false;
  };
  double product = 0, squares = 0;
  for (std::int64_t r = 0; r < out.size(0); ++r) {
    for (std::int64_t i = 0; i < out.size(1); ++i) {
      for (std::int64_t h = 0; h < out.size(2); ++h) {
        const double l = element(lse, r * lse.stride(0) + h * lse.stride(1) + i * lse.stride(2));
        const double ref_l =
            element(ref_lse, r * ref_lse.stride(0) + h * ref_lse.stride(1) + i * ref_lse.stride(2));
        const bool empty = std::isinf(ref_l);
        const bool lse_ok = empty ? l == ref_l : close(l, ref_l, tolerance.lse_abs, tolerance.lse_rel);
        if (!empty) c.lse_max_abs = std::max(c.lse_max_abs, std::abs(l - ref_l));
        if (!lse_ok) {
          fail(fmt::format("lse[request {}, head {}, query {}] is {}, expected {}", r, h, i, l, ref_l));
        }
        const std::int64_t at = r * out.stride(0) + i * out.stride(1) + h * out.stride(2);
        const std::int64_t ref_at = r * ref_out.stride(0) + i * ref_out.stride(1) + h * ref_out.stride(2);
        for (std::int64_t d = 0; d < out.size(3); ++d) {
          const double x = element(out, at + d), y = element(ref_out, ref_at + d);
          const bool ok = empty ? x == 0.0 : close(x, y, tolerance.out_abs, tolerance.out_rel);
          if (!ok) {
            fail(fmt::format("out[request {}, query {}, head {}, {}] is {}, expected {}", r, i, h, d, x,
                             empty ? 0.0 : y));
          }
          c.out_max_abs = std::max(c.out_max_abs, std::abs(x - y));
          product += x * y;
          squares += x * x + y * y;
        }
      }
    }
  }
  if (squares > 0) c.out_cosine = 1.0 - 2.0 * product / squares;
  if (!(c.out_cosine < tolerance.out_cosine)) {
    fail(fmt::format("the cosine difference of out is {:.3g}, expected below {:.3g}", c.out_cosine,
                     tolerance.out_cosine));
  }
  return c;
}

}  // namespace flash_mla::bench
