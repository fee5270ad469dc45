#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/routing.h"
#include "checkpoint/stored_format.h"

namespace flash_mla::checkpoint {

/// YaRN (arXiv 2309.00071) in the form of DeepSeek's configuration. factor == 1: plain RoPE.
struct RopeScaling {
  double factor = 1.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 1.0;
  double mscale_all_dim = 0.0;
  std::int64_t original_max_position_embeddings = 4096;
};

/// DeepSeek's norms inside the attention have this epsilon, whatever rms_norm_eps says.
inline constexpr double kLatentNormEps = 1e-6;

/// config.json of a DeepSeek checkpoint, or of a model of that architecture. Names are those of the file.
struct ModelConfig {
  /// "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa" or "kimi_k2"
  std::string model_type;
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_hidden_layers = 0;
  int num_attention_heads = 0;
  int q_lora_rank = 0;  ///< 0: queries are projected directly
  int kv_lora_rank = 512;
  int qk_nope_head_dim = 128;
  int qk_rope_head_dim = 64;
  int v_head_dim = 128;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool rope_interleave = true;  ///< pairs are neighbours (2i, 2i+1), as in every published checkpoint
  std::int64_t max_position_embeddings = 4096;
  bool tie_word_embeddings = false;
  bool attention_bias = false;

  int n_routed_experts = 0;  ///< 0: every layer is dense
  int n_shared_experts = 0;
  int num_experts_per_tok = 0;
  int moe_intermediate_size = 0;
  int moe_layer_freq = 1;
  int first_k_dense_replace = 0;
  int n_group = 1;
  int topk_group = 1;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1.0;
  ScoringFunc scoring_func = ScoringFunc::kSoftmax;
  TopkMethod topk_method = TopkMethod::kGreedy;

  // DeepSeek sparse attention: an indexer chooses the tokens that attention looks at.
  int index_topk = 0;  ///< of how many tokens; 0: attention is dense
  int index_n_heads = 0;
  int index_head_dim = 0;
  bool indexer_rope_interleave = false;  ///< as rope_interleave, of the indexer's queries and keys
  /// (num_hidden_layers), or empty for none: layers that attend to what the layer before them chose.
  std::vector<bool> shares_index;

  /// Of quantised weights, by quantization_config.
  StoredFormat stored;

  int bos_token_id = -1;
  std::vector<int> eos_token_ids;

  bool is_moe_layer(int layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  /// Whether a layer has an indexer of its own.
  bool has_indexer(int layer) const {
    return index_topk > 0 && (shares_index.empty() || !shares_index[static_cast<std::size_t>(layer)]);
  }
  /// The choice of experts.
  Routing routing() const {
    return {n_routed_experts, num_experts_per_tok, n_shared_experts,
            n_group,          topk_group,          scoring_func,
            topk_method,      norm_topk_prob,      static_cast<float>(routed_scaling_factor)};
  }
  /// Factor on q·k: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 times the square of YaRN's mscale.
  double softmax_scale() const;
};

/// How a checkpoint asks to be sampled from, by DIR/generation_config.json; what it does not say is empty.
struct SamplingDefaults {
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<int> top_k;  ///< 0: all
};

/// Throws InvalidArgument for a value out of range. A directory without the file has no defaults.
SamplingDefaults read_sampling_defaults(const std::filesystem::path& directory);

/// Parses the text of a config.json. `origin` names it in errors. Throws InvalidArgument for a malformed or
/// missing field, Unsupported for an architecture or option that the engine does not run; both name the
/// field, its value and what was expected.
ModelConfig parse_config(std::string_view text, std::string_view origin);

/// Reads DIR/config.json, and eos/bos from DIR/generation_config.json where that exists.
ModelConfig read_config(const std::filesystem::path& directory);

}  // namespace flash_mla::checkpoint
