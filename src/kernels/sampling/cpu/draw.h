#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sampling/draw.h"

namespace flash_mla::cpu {

/// `temperature` > 0, `min_p` in [0, 1).
Draw make_draw(double u, double temperature, int top_k, double top_p, double min_p);

/// Makes every logit -inf whose bit t % 32 of allowed[t / 32] is not set.
void exclude_others(std::span<float> logits, std::span<const std::uint32_t> allowed);

/// Memory that draw_token keeps.
struct DrawScratch {
  std::vector<std::uint64_t> weights;
  std::vector<std::int32_t> candidates;
};

/// The token. `largest` is the largest of `logits`, and finite; none is NaN or +inf. `draw.scale` > 0.
std::int32_t draw_token(std::span<const float> logits, float largest, const Draw& draw, DrawScratch& scratch);

}  // namespace flash_mla::cpu
