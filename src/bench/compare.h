#pragma once

// Is a result close enough to the fp64 reference?

#include <string>

#include "flash_mla/decode.h"

namespace flash_mla::bench {

/// An element passes when it is within `*_abs` of the reference or within `*_rel` of its magnitude; `out` as
/// a whole passes when its cosine difference 1 - 2 sum(xy) / sum(x^2 + y^2) is below `out_cosine`.
struct Tolerance {
  double out_abs, out_rel, out_cosine;
  double lse_abs, lse_rel;
};

/// For q and cache drawn as clamp(N(0, 1) / 10, -1, 1).
Tolerance tolerance_for(DType dtype);

struct Comparison {
  bool ok = true;
  double out_max_abs = 0;
  double out_cosine = 0;
  double lse_max_abs = 0;
  /// What is wrong first, with index, value and expected value; "" when ok.
  std::string failure;
};

/// `out` (b, s_q, h_q, d_v) and `lse` (b, h_q, s_q) against `ref_out` and `ref_lse` of the same shapes. The
/// dtypes may be any floating type. NaN never passes; an infinite lse must be matched exactly, and its row
/// of `out` must be exactly 0.
Comparison compare_outputs(const TensorView& out, const TensorView& lse, const TensorView& ref_out,
                           const TensorView& ref_lse, const Tolerance& tolerance);

}  // namespace flash_mla::bench
