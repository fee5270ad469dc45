#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flash_mla::model {

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

/// `temperature` > 0, `min_p` in [0, 1).
Draw make_draw(double u, double temperature, int top_k, double top_p, double min_p);

/// Memory that draw_token keeps.
struct DrawScratch {
  std::vector<std::uint64_t> weights;
  std::vector<std::int32_t> candidates;
};

/// The token. `largest` is the largest of `logits`, and finite; none is NaN or +inf. `draw.scale` > 0.
std::int32_t draw_token(std::span<const float> logits, float largest, const Draw& draw, DrawScratch& scratch);

}  // namespace flash_mla::model
