#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sampling/draw.h"
#include "kernels/sampling/token_rule.h"

namespace flash_mla::cpu {

/// `temperature` > 0, `min_p` in [0, 1).
Draw make_draw(double u, double temperature, int top_k, double top_p, double min_p);

/// Changes the row as the rule says.
void apply_rule(std::span<float> logits, const TokenRule& rule);

/// Memory that draw_token keeps.
struct DrawScratch {
  std::vector<std::uint64_t> weights;
  std::vector<std::int32_t> candidates;
};

/// The token. `largest` is the largest of `logits`, and finite; none is NaN or +inf. `draw.scale` > 0.
std::int32_t draw_token(std::span<const float> logits, float largest, const Draw& draw, DrawScratch& scratch);

}  // namespace flash_mla::cpu
