#pragma once

// What the kernel of all layers for one token (kernels/fused) takes of a model's configuration.

#include "checkpoint/config.h"
#include "kernels/fused/sm90/one_token.h"

namespace flash_mla::model {

/// The sizes and constants of a model, but for softmax_scale; pointers are left null.
inline sm90::OneToken one_token_of(const checkpoint::ModelConfig& c) {
  sm90::OneToken p;
  p.num_layers = c.num_hidden_layers;
  p.hidden = c.hidden_size;
  p.heads = c.num_attention_heads;
  p.nope = c.qk_nope_head_dim;
  p.v = c.v_head_dim;
  p.moe_intermediate = c.moe_intermediate_size;
  p.intermediate = c.intermediate_size;
  p.routing = c.routing();
  p.eps = static_cast<float>(c.rms_norm_eps);
  p.latent_eps = static_cast<float>(checkpoint::kLatentNormEps);
  return p;
}

/// Whether the kernel takes this model on the current device: queries projected directly and no biases, a
/// latent and a rotated part of its sizes, and what fits_one_token() asks for.
inline bool fits_one_token(const checkpoint::ModelConfig& c) {
  if (c.q_lora_rank > 0 || c.attention_bias) return false;
  if (c.kv_lora_rank != sm90::kOneTokenRank || c.qk_rope_head_dim != sm90::kOneTokenRope) return false;
  bool dense = false, mixture = false;
  for (int i = 0; i < c.num_hidden_layers; ++i) (c.is_moe_layer(i) ? mixture : dense) = true;
  return sm90::fits_one_token(one_token_of(c), dense, mixture);
}

/// The same of the layer of its module for multi-token prediction, where the model fits.
inline bool module_fits_one_token(const checkpoint::ModelConfig& c) {
  const bool mixture = c.is_moe_layer(c.num_hidden_layers);
  return sm90::fits_one_token(one_token_of(c), !mixture, mixture);
}

}  // namespace flash_mla::model
