#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flash_mla/export.h"
#include "kernels/sampling/draw.h"
#include "kernels/sampling/token_rule.h"

namespace flash_mla::cpu {

/// `temperature` > 0, `min_p` in [0, 1).
FLASH_MLA_API Draw make_draw(double u, double temperature, int top_k, double top_p, double min_p);

/// Changes the row as the rule says.
FLASH_MLA_API void apply_rule(std::span<float> logits, const TokenRule& rule);

/// Memory that draw_token keeps.
struct DrawScratch {
  std::vector<std::uint64_t> weights;
  std::vector<std::int32_t> candidates;
};

/// The token. `largest` is the largest of `logits`, and finite; none is NaN or +inf. `draw.scale` > 0.
FLASH_MLA_API std::int32_t draw_token(std::span<const float> logits, float largest, const Draw& draw,
                                      DrawScratch& scratch);

/// draw_token in its steps, for what draws from probabilities or wants to know what would be drawn from.
///
/// Weights of a row into scratch.weights, 0 below draw.min_weight; returns their sum. `largest` as draw_token's; of
/// probabilities it is > 0.
std::uint64_t weigh_logits(std::span<const float> logits, float largest, const Draw& draw,
                           DrawScratch& scratch);
std::uint64_t weigh_probabilities(std::span<const float> probabilities, float largest, const Draw& draw,
                                  DrawScratch& scratch);
/// The tokens of positive weight that top_k and top_p leave, into scratch.candidates in the order of ids; returns the sum of
/// their weights. `joint`: top_p is of the sum before top_k cuts.
std::uint64_t keep_likeliest(std::span<const float> values, const Draw& draw, std::uint64_t total, bool joint,
                             DrawScratch& scratch);
/// The token that draw.u falls on. `total` > 0.
std::int32_t draw_weighed(std::span<const float> values, const Draw& draw, std::uint64_t total, bool joint,
                          DrawScratch& scratch);

}  // namespace flash_mla::cpu
