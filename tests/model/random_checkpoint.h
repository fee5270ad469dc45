#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/element.h"
#include "base/fp8.h"
#include "checkpoint/config.h"
#include "kernels/quant/cpu/weights.h"
#include "safetensors_file.h"

namespace flash_mla::model {

/// How a checkpoint stores the projections of its layers.
enum class Stored {
  kBf16,
  kFp8,                ///< e4m3 with scales of float32 for blocks of 128 x 128
  kFp8Powers,          ///< the same with scales in e8m0
  kDequantised,        ///< what kFp8 means, rounded to bfloat16
  kDequantisedPowers,  ///< the same of kFp8Powers
  kInt4,  ///< experts in 4 bits as compressed-tensors packs them, groups of 128; the rest as in kBf16
  kDequantisedInt4,  ///< what kInt4 means, rounded to bfloat16
};

/// The bytes of a safetensors file with random weights for a configuration, the same in every form, so that engines of
/// all precisions start from the same values. A few projections
/// have weights of 40 times the size of the others, but in kBf16. `with_module`: and a module for multi-token prediction;
/// the other weights are the same ones.
class RandomCheckpoint {
 public:
  explicit RandomCheckpoint(const ModelConfig& c, Stored stored = Stored::kBf16, bool with_module = false)
      : c_(c), stored_(stored) {
    random("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, 1.0f);
    random("lm_head.weight", {c.vocab_size, c.hidden_size});
    norm("model.norm.weight", c.hidden_size);
    for (int i = 0; i < c.num_hidden_layers; ++i) layer(i);
    if (with_module) module();
  }
  std::string bytes() const { return file_.bytes(); }

 private:
  std::vector<std::uint16_t> values(const std::vector<std::int64_t>& shape, float mean, float deviation) {
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
    return values;
  }
  void add(const std::string& name, const std::vector<std::int64_t>& shape, float mean, float deviation) {
    file_.add(name, "BF16", shape, values(shape, mean, deviation));
  }

  /// A matrix of a layer, in the checkpoint's form.
  void projection(const std::string& name, std::int64_t rows, std::int64_t columns) {
    std::vector<std::uint16_t> bf16 = values({rows, columns}, 0, 1 / std::sqrt(static_cast<float>(columns)));
    const bool int4 = stored_ == Stored::kInt4 || stored_ == Stored::kDequantisedInt4;
    if (stored_ == Stored::kBf16 || (int4 && name.find("experts.") == std::string::npos)) {
      file_.add(name, "BF16", {rows, columns}, bf16);
      return;
    }
    std::vector<float> wide(bf16.size());
    for (std::size_t i = 0; i < wide.size(); ++i)
      wide[i] = to_float(Bf16{bf16[i]}) * (random_() % 997 == 0 ? 40.0f : 1.0f);
    if (stored_ == Stored::kInt4 || stored_ == Stored::kDequantisedInt4) {
      int4_projection(name, rows, columns, wide);
      return;
    }
    const std::int64_t block_rows = (rows + 127) / 128, block_columns = (columns + 127) / 128;
    std::vector<std::uint8_t> codes(wide.size());
    std::vector<float> scales(static_cast<std::size_t>(block_rows * block_columns));
    const bool powers = stored_ == Stored::kFp8Powers || stored_ == Stored::kDequantisedPowers;
    cpu::quantise_fp8_blocks(wide.data(), rows, columns, powers, codes.data(), scales.data());
    if (stored_ == Stored::kDequantised || stored_ == Stored::kDequantisedPowers) {
      for (std::int64_t i = 0; i < rows * columns; ++i) {
        const std::int64_t block = i / columns / 128 * block_columns + i % columns / 128;
        const auto at = static_cast<std::size_t>(i);
        bf16[at] = to_bf16(to_float(E4m3{codes[at]}) * scales[static_cast<std::size_t>(block)]).bits;
      }
      file_.add(name, "BF16", {rows, columns}, bf16);
      return;
    }
    file_.add(name, "F8_E4M3", {rows, columns}, codes);
    const std::vector<std::int64_t> shape = {block_rows, block_columns};
    if (!powers) {
      file_.add(name + "_scale_inv", "F32", shape, scales);
      return;
    }
    std::vector<std::uint8_t> exponents;
    exponents.reserve(scales.size());
    for (const float scale : scales) exponents.push_back(to_e8m0(scale).bits);
    file_.add(name + "_scale_inv", "F8_E8M0", shape, exponents);
  }
  void int4_projection(const std::string& name, std::int64_t rows, std::int64_t columns,
                       const std::vector<float>& wide) {
    const std::int64_t groups = (columns + 127) / 128, words = (columns + 7) / 8;
    std::vector<std::uint8_t> codes(wide.size());
    std::vector<float> scales(static_cast<std::size_t>(rows * groups));
    cpu::quantise_int4(wide.data(), rows, columns, 128, codes.data(), scales.data());
    std::vector<std::uint16_t> meaning(wide.size()), narrow_scales;
    std::vector<std::int32_t> packed(static_cast<std::size_t>(rows * words));
    for (const float scale : scales) narrow_scales.push_back(to_bf16(scale).bits);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      const std::int64_t row = i / columns, column = i % columns;
      const auto at = static_cast<std::size_t>(i);
      const float scale = scales[static_cast<std::size_t>(row * groups + column / 128)];
      meaning[at] = to_bf16((static_cast<float>(codes[at]) - 8) * scale).bits;
      auto& word = packed[static_cast<std::size_t>(row * words + column / 8)];
      word = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) |
                                       static_cast<std::uint32_t>(codes[at]) << (4 * (column % 8)));
    }
    if (stored_ == Stored::kDequantisedInt4) {
      file_.add(name, "BF16", {rows, columns}, meaning);
      return;
    }
    file_.add(name + "_packed", "I32", {rows, words}, packed);
    file_.add(name + "_scale", "BF16", {rows, groups}, narrow_scales);
    file_.add(name + "_shape", "I64", {2}, std::vector<std::int64_t>{rows, columns});
  }
  /// `deviation` 0: that which keeps the size of what it multiplies.
  void random(const std::string& name, const std::vector<std::int64_t>& shape, float deviation = 0) {
    add(name, shape, 0, deviation > 0 ? deviation : 1 / std::sqrt(static_cast<float>(shape.back())));
  }
  void norm(const std::string& name, std::int64_t size) { add(name, {size}, 1, 0.1f); }

  void feed_forward(const std::string& name, std::int64_t width) {
    projection(name + ".gate_proj.weight", width, c_.hidden_size);
    projection(name + ".up_proj.weight", width, c_.hidden_size);
    projection(name + ".down_proj.weight", c_.hidden_size, width);
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
      projection(a + ".q_a_proj.weight", c_.q_lora_rank, hidden);
      norm(a + ".q_a_layernorm.weight", c_.q_lora_rank);
      projection(a + ".q_b_proj.weight", heads * (nope + rope), c_.q_lora_rank);
    } else {
      projection(a + ".q_proj.weight", heads * (nope + rope), hidden);
    }
    projection(a + ".kv_a_proj_with_mqa.weight", rank + rope, hidden);
    norm(a + ".kv_a_layernorm.weight", rank);
    projection(a + ".kv_b_proj.weight", heads * (nope + c_.v_head_dim), rank);
    projection(a + ".o_proj.weight", hidden, heads * c_.v_head_dim);
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

  void module() {
    const std::string name = "model.layers." + std::to_string(c_.num_hidden_layers);
    layer(c_.num_hidden_layers);
    for (const char* part : {".enorm.weight", ".hnorm.weight", ".shared_head.norm.weight"})
      norm(name + part, c_.hidden_size);
    random(name + ".eh_proj.weight", {c_.hidden_size, 2 * std::int64_t{c_.hidden_size}});
  }

  ModelConfig c_;
  Stored stored_;
  SafetensorsFile file_;
  std::mt19937 random_{7};
};

}  // namespace flash_mla::model
