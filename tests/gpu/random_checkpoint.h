#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "model/safetensors_file.h"

namespace flash_mla::model {

/// The bytes of a safetensors file with random bfloat16 weights for a configuration, so that engines of both
/// precisions start from the same values.
class RandomCheckpoint {
 public:
  explicit RandomCheckpoint(const ModelConfig& c) : c_(c) {
    random("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, 1.0f);
    random("lm_head.weight", {c.vocab_size, c.hidden_size});
    norm("model.norm.weight", c.hidden_size);
    for (int i = 0; i < c.num_hidden_layers; ++i) layer(i);
  }
  std::string bytes() const { return file_.bytes(); }

 private:
  void add(const std::string& name, const std::vector<std::int64_t>& shape, float mean, float deviation) {
    std::int64_t size = 1;
    for (const std::int64_t n : shape) size *= n;
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<std::uint16_t> values(static_cast<std::size_t>(size));
    for (std::uint16_t& v : values) {
      const float x = normal(random_);
      std::uint32_t bits = 0;
      std::memcpy(&bits, &x, sizeof bits);
      v = static_cast<std::uint16_t>(bits >> 16);
    }
    file_.add(name, "BF16", shape, values);
  }
  /// `deviation` 0: that which keeps the size of what it multiplies.
  void random(const std::string& name, const std::vector<std::int64_t>& shape, float deviation = 0) {
    add(name, shape, 0, deviation > 0 ? deviation : 1 / std::sqrt(static_cast<float>(shape.back())));
  }
  void norm(const std::string& name, std::int64_t size) { add(name, {size}, 1, 0.1f); }

  void feed_forward(const std::string& name, std::int64_t width) {
    random(name + ".gate_proj.weight", {width, c_.hidden_size});
    random(name + ".up_proj.weight", {width, c_.hidden_size});
    random(name + ".down_proj.weight", {c_.hidden_size, width});
  }

  void indexer(const std::string& name) {
    random(name + ".wq_b.weight", {std::int64_t{c_.index_n_heads} * c_.index_head_dim, c_.q_lora_rank});
    random(name + ".wk.weight", {c_.index_head_dim, c_.hidden_size});
    norm(name + ".k_norm.weight", c_.index_head_dim);
    random(name + ".k_norm.bias", {c_.index_head_dim}, 0.1f);
    random(name + ".weights_proj.weight", {c_.index_n_heads, c_.hidden_size});
  }

  void layer(int index) {
    const std::string name = "model.layers." + std::to_string(index), a = name + ".self_attn";
    const std::int64_t heads = c_.num_attention_heads, nope = c_.qk_nope_head_dim;
    const std::int64_t rope = c_.qk_rope_head_dim, hidden = c_.hidden_size, rank = c_.kv_lora_rank;
    norm(name + ".input_layernorm.weight", hidden);
    norm(name + ".post_attention_layernorm.weight", hidden);
    if (c_.q_lora_rank > 0) {
      random(a + ".q_a_proj.weight", {c_.q_lora_rank, hidden});
      norm(a + ".q_a_layernorm.weight", c_.q_lora_rank);
      random(a + ".q_b_proj.weight", {heads * (nope + rope), c_.q_lora_rank});
    } else {
      random(a + ".q_proj.weight", {heads * (nope + rope), hidden});
    }
    random(a + ".kv_a_proj_with_mqa.weight", {rank + rope, hidden});
    norm(a + ".kv_a_layernorm.weight", rank);
    random(a + ".kv_b_proj.weight", {heads * (nope + c_.v_head_dim), rank});
    random(a + ".o_proj.weight", {hidden, heads * c_.v_head_dim});
    if (c_.attention_bias) {
      if (c_.q_lora_rank > 0) random(a + ".q_a_proj.bias", {c_.q_lora_rank});
      random(a + ".kv_a_proj_with_mqa.bias", {rank + rope});
      random(a + ".o_proj.bias", {hidden});
    }
    if (c_.has_indexer(index)) indexer(a + ".indexer");
    if (!c_.is_moe_layer(index)) {
      feed_forward(name + ".mlp", c_.intermediate_size);
      return;
    }
    // Scores far apart: where two experts are nearly equal, rounding alone chooses between them.
    random(name + ".mlp.gate.weight", {c_.n_routed_experts, hidden},
           4 / std::sqrt(static_cast<float>(hidden)));
    if (c_.topk_method == TopkMethod::kNoAuxTc) {
      random(name + ".mlp.gate.e_score_correction_bias", {c_.n_routed_experts}, 0.1f);
    }
    for (int e = 0; e < c_.n_routed_experts; ++e) {
      feed_forward(name + ".mlp.experts." + std::to_string(e), c_.moe_intermediate_size);
    }
    if (c_.n_shared_experts > 0) {
      feed_forward(name + ".mlp.shared_experts",
                   std::int64_t{c_.n_shared_experts} * c_.moe_intermediate_size);
    }
  }

  ModelConfig c_;
  SafetensorsFile file_;
  std::mt19937 random_{7};
};

}  // namespace flash_mla::model
