#pragma once

#include <cstdint>

namespace flash_mla {

/// How one token is drawn from a row of logits: of the tokens whose weight is at least min_weight, of these
/// the top_k likeliest, of these the likeliest that together reach top_p of their sum, the one at which the
/// sum of weights, in the order of ids, passes `u` of the whole.
///
/// A weight is a whole number (draw_weight), so sums do not depend on their order, and a GPU draws the very
/// token that the CPU draws from the same logits.
struct Draw {
  double u = 0;                  ///< in [0, 1)
  double top_p = 1;              ///< 1: all
  std::uint64_t min_weight = 1;  ///< >= 1
  float scale = 0;               ///< 1 / temperature; 0: not drawn, the likeliest token is wanted
  std::int32_t top_k = 0;        ///< 0: all
};
static_assert(sizeof(Draw) == 32);

}  // namespace flash_mla
