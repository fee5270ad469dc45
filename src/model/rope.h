#pragma once

#include <vector>

#include "checkpoint/config.h"

namespace flash_mla::model {

using checkpoint::ModelConfig;

/// Rotary embedding of a configuration: pair i at position p turns by p * inv_freq[i]; cos and sin are
/// multiplied by `scale`.
struct Rope {
  std::vector<float> inv_freq;  ///< (qk_rope_head_dim / 2)
  float scale = 1.0f;
};

/// Plain RoPE, or YaRN (arXiv 2309.00071, section 3.2 "NTK-by-parts") when rope_scaling.factor > 1.
Rope make_rope(const ModelConfig& config);

}  // namespace flash_mla::model
