#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>

namespace flash_mla::model {
namespace {

/// YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1.
double temperature(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

/// The (fractional) pair that turns `rotations` times within the original context.
double pair_of_rotations(double rotations, double dim, double theta, double context) {
  return dim * std::log(context / (rotations * 2.0 * std::numbers::pi)) / (2.0 * std::log(theta));
}

}  // namespace

Rope make_rope(const ModelConfig& config) {
  const int dim = config.qk_rope_head_dim;
  const auto theta = static_cast<float>(config.rope_theta);
  const checkpoint::RopeScaling& yarn = config.rope_scaling;
  Rope rope;
  // In float32 throughout, as models are trained with.
  for (int i = 0; i < dim; i += 2) {
    rope.inv_freq.push_back(1.0f / std::pow(theta, static_cast<float>(i) / static_cast<float>(dim)));
  }
  if (yarn.factor <= 1.0) return rope;

  // Pairs below `low` turn often enough to be left alone, those above `high` are slowed by the factor, and a
  // linear ramp lies between.
  const auto context = static_cast<double>(yarn.original_max_position_embeddings);
  const double low =
      std::max(std::floor(pair_of_rotations(yarn.beta_fast, dim, config.rope_theta, context)), 0.0);
  double high = std::min(std::ceil(pair_of_rotations(yarn.beta_slow, dim, config.rope_theta, context)),
                         static_cast<double>(dim - 1));
  if (high == low) high += 0.001;
  for (std::size_t i = 0; i < rope.inv_freq.size(); ++i) {
    const float ramp =
        std::clamp(static_cast<float>((static_cast<double>(i) - low) / (high - low)), 0.0f, 1.0f);
    const float slowed = rope.inv_freq[i] / static_cast<float>(yarn.factor);
    rope.inv_freq[i] = slowed * ramp + rope.inv_freq[i] * (1.0f - ramp);
  }
  // Without mscale_all_dim the whole temperature is on cos and sin; with it, what the softmax scale leaves.
  rope.scale = static_cast<float>(yarn.mscale != 0.0 && yarn.mscale_all_dim != 0.0
                                      ? temperature(yarn.factor, yarn.mscale) /
                                            temperature(yarn.factor, yarn.mscale_all_dim)
                                      : temperature(yarn.factor, 1.0));
  return rope;
}

}  // namespace flash_mla::model
