#include "checkpoint/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/json.h"
#include "checkpoint/quantization_config.h"
#include "flash_mla/error.h"

namespace flash_mla::checkpoint {
namespace {

constexpr std::int64_t kMaxDim = 1 << 24;     // widths, ranks, vocabularies
constexpr std::int64_t kMaxTokens = 1 << 28;  // positions
constexpr std::int64_t kMaxLayers = 1 << 16;
constexpr std::int64_t kMaxExperts = 1 << 16;

// The largest k of top_k.
constexpr std::int64_t kMaxIndexTopk = 4096;

constexpr const char* kModelTypes =
    R"("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa" or "kimi_k2")";

bool is_known(const std::string& type) {
  return type == "deepseek_v2" || type == "deepseek_v3" || type == "deepseek_v32" || type == "glm_moe_dsa" ||
         type == "kimi_k2";
}

int dimension(const JsonObject& in, const char* name) {
  return static_cast<int>(in.integer(name, 1, kMaxDim));
}

/// YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, equation 22, with
/// DeepSeek's multiplier).
double yarn_mscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

RopeScaling read_rope_scaling(const JsonObject& in) {
  RopeScaling out;
  const char* type_name = in.has("rope_type") ? "rope_type" : "type";
  const std::string type = in.string_or(type_name, "default");
  if (type == "default") return out;
  if (type != "yarn") in.refuse(type_name, "\"yarn\" or \"default\"");
  out.factor = in.number("factor", 1.0, 1e6);
  out.beta_fast = in.number_or("beta_fast", out.beta_fast, 1e-6, 1e6);
  out.beta_slow = in.number_or("beta_slow", out.beta_slow, 1e-6, 1e6);
  out.mscale = in.number_or("mscale", out.mscale, 0.0, 1e3);
  out.mscale_all_dim = in.number_or("mscale_all_dim", out.mscale_all_dim, 0.0, 1e3);
  out.original_max_position_embeddings = in.integer("original_max_position_embeddings", 1, kMaxTokens);
  // With only one of the two, DeepSeek's own code and transformers disagree on the factor of cos and sin.
  if ((out.mscale == 0.0 || !in.has("mscale")) && out.mscale_all_dim != 0.0) {
    in.refuse("mscale", "a positive number, as mscale_all_dim is given");
  }
  if (out.mscale != 1.0 && out.mscale_all_dim == 0.0) {
    in.refuse("mscale_all_dim", "a positive number, as mscale is given");
  }
  if (in.has("attention_factor")) in.refuse("attention_factor", "none: mscale and mscale_all_dim give it");
  if (!in.boolean_or("truncate", true)) in.refuse("truncate", "true");
  return out;
}

/// Frequencies: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters` (transformers 5).
void read_rope(const JsonObject& in, ModelConfig& out) {
  const char* name = in.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  out.rope_theta = in.number_or("rope_theta", out.rope_theta, 1.0, 1e12);
  if (in.has(name)) {
    const JsonObject rope = in.object(name);
    out.rope_theta = rope.number_or("rope_theta", out.rope_theta, 1.0, 1e12);
    out.rope_scaling = read_rope_scaling(rope);
    if (rope.number_or("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0) {
      rope.refuse("partial_rotary_factor", "1");
    }
  }
  out.rope_interleave = out.model_type == "deepseek_v2" || in.boolean_or("rope_interleave", true);
}

void read_routing(const JsonObject& in, ModelConfig& out) {
  // All but V2 route as V3 does.
  const bool v3 = out.model_type != "deepseek_v2";
  const std::string scoring = in.string_or("scoring_func", v3 ? "sigmoid" : "softmax");
  if (scoring != (v3 ? "sigmoid" : "softmax")) {
    in.refuse("scoring_func", v3 ? "\"sigmoid\" for " + out.model_type : "\"softmax\" for deepseek_v2");
  }
  out.scoring_func = v3 ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;

  const std::string method = in.string_or("topk_method", v3 ? "noaux_tc" : "greedy");
  if (v3 && method == "noaux_tc") {
    out.topk_method = TopkMethod::kNoAuxTc;
  } else if (!v3 && method == "greedy") {
    out.topk_method = TopkMethod::kGreedy;
  } else if (!v3 && method == "group_limited_greedy") {
    out.topk_method = TopkMethod::kGroupLimitedGreedy;
  } else {
    in.refuse("topk_method", v3 ? "\"noaux_tc\" for " + out.model_type
                                : "\"greedy\" or \"group_limited_greedy\" for deepseek_v2");
  }

  out.num_experts_per_tok = static_cast<int>(in.integer("num_experts_per_tok", 1, out.n_routed_experts));
  if (out.topk_method != TopkMethod::kGreedy) {
    out.n_group = static_cast<int>(in.integer("n_group", 1, out.n_routed_experts));
    if (out.n_routed_experts % out.n_group != 0) {
      in.fail("n_group", fmt::format("a divisor of n_routed_experts = {}", out.n_routed_experts));
    }
    out.topk_group = static_cast<int>(in.integer("topk_group", 1, out.n_group));
    const int group = out.n_routed_experts / out.n_group;
    if (v3 && group < 2) in.fail("n_group", "groups of at least 2 experts, whose scores are added");
    if (out.num_experts_per_tok > out.topk_group * group) {
      in.fail("num_experts_per_tok", fmt::format("at most {}, the experts in topk_group = {} groups of {}",
                                                 out.topk_group * group, out.topk_group, group));
    }
  }
  out.routed_scaling_factor = in.number("routed_scaling_factor", 0.0, 1e6);
  out.norm_topk_prob = in.boolean("norm_topk_prob");
  // DeepSeek's code normalises then and leaves out the factor, transformers ignores the field; no published
  // checkpoint sets it.
  if (!v3 && out.norm_topk_prob) in.refuse("norm_topk_prob", "false for deepseek_v2");
}

void read_experts(const JsonObject& in, ModelConfig& out) {
  if (!in.json().contains("n_routed_experts")) {
    in.fail("n_routed_experts", "the number of routed experts, or null for a dense model");
  }
  out.n_routed_experts = static_cast<int>(in.integer_or("n_routed_experts", 0, 0, kMaxExperts));
  if (out.n_routed_experts == 0) return;
  out.n_shared_experts = static_cast<int>(in.integer_or("n_shared_experts", 0, 0, kMaxExperts));
  out.moe_intermediate_size = dimension(in, "moe_intermediate_size");
  out.moe_layer_freq = static_cast<int>(in.integer_or("moe_layer_freq", 1, 1, kMaxLayers));
  out.first_k_dense_replace = static_cast<int>(in.integer("first_k_dense_replace", 0, kMaxLayers));
  read_routing(in, out);
}

/// mlp_layer_types says again which layers are mixtures of experts.
void read_mlp_types(const JsonObject& in, const ModelConfig& out) {
  if (!in.has("mlp_layer_types")) return;
  const Json& types = in.array("mlp_layer_types");
  Json expected = Json::array();
  for (int i = 0; i < out.num_hidden_layers; ++i) {
    expected.push_back(out.is_moe_layer(i) ? "sparse" : "dense");
  }
  if (types != expected) {
    in.refuse("mlp_layer_types",
              "the layers that first_k_dense_replace and moe_layer_freq say: " + expected.dump());
  }
}

/// Which layers share the choice of the one before: a list, a pattern of F and S, or every freq-th from an offset
/// on has its own.
void read_index_sharing(const JsonObject& in, ModelConfig& out) {
  const auto layers = static_cast<std::size_t>(out.num_hidden_layers);
  std::vector<bool> shares(layers);
  const char* name = "index_topk_freq";
  if (in.has("indexer_types")) {
    name = "indexer_types";
    const Json& types = in.array(name);
    if (types.size() != layers) in.fail(name, fmt::format("num_hidden_layers = {} entries", layers));
    for (std::size_t i = 0; i < layers; ++i) {
      if (types[i] != "full" && types[i] != "shared") in.fail(name, "entries \"full\" or \"shared\"");
      shares[i] = types[i] == "shared";
    }
  } else if (in.has("index_topk_pattern")) {
    name = "index_topk_pattern";
    const std::string pattern = in.string(name);
    if (pattern.size() != layers || pattern.find_first_not_of("FS") != std::string::npos) {
      in.fail(name, fmt::format("num_hidden_layers = {} letters F or S", layers));
    }
    for (std::size_t i = 0; i < layers; ++i) shares[i] = pattern[i] == 'S';
  } else {
    const std::int64_t freq = in.integer_or(name, 1, 0, kMaxLayers);
    const std::int64_t offset = in.integer_or("index_skip_topk_offset", 2, 0, kMaxLayers);
    for (std::size_t i = 0; i < layers; ++i) {
      const std::int64_t at = std::max<std::int64_t>(static_cast<std::int64_t>(i) - offset + 1, 0);
      shares[i] = at % std::max<std::int64_t>(freq, 1) != 0;
    }
  }
  if (shares[0]) in.fail(name, "a first layer with an indexer of its own");
  if (std::find(shares.begin(), shares.end(), true) != shares.end()) out.shares_index = std::move(shares);
}

void read_indexer(const JsonObject& in, ModelConfig& out) {
  const bool glm = out.model_type == "glm_moe_dsa";
  if (!glm && out.model_type != "deepseek_v32") return;
  out.index_topk = static_cast<int>(in.integer("index_topk", 1, kMaxIndexTopk));
  out.index_n_heads = static_cast<int>(in.integer("index_n_heads", 1, 128));
  out.index_head_dim = static_cast<int>(in.integer("index_head_dim", 16, 256));
  if (out.index_head_dim % 16 != 0) in.fail("index_head_dim", "a multiple of 16");
  if (out.index_head_dim < out.qk_rope_head_dim) {
    in.fail("index_head_dim", fmt::format("at least qk_rope_head_dim = {}", out.qk_rope_head_dim));
  }
  if (out.q_lora_rank == 0) in.fail("q_lora_rank", "a rank: the indexer's queries are made from it");
  out.indexer_rope_interleave = in.boolean_or("indexer_rope_interleave", glm);
  if (glm) read_index_sharing(in, out);
}

void read_token_ids(const JsonObject& in, ModelConfig& out) {
  out.bos_token_id = static_cast<int>(in.integer_or("bos_token_id", out.bos_token_id, -1, kMaxDim));
  const Json* eos = in.find("eos_token_id");
  if (eos == nullptr) return;
  out.eos_token_ids.clear();
  for (const Json& id : eos->is_array() ? *eos : Json::array({*eos})) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > kMaxDim) {
      in.fail("eos_token_id", "a token or a list of tokens");
    }
    out.eos_token_ids.push_back(id.get<int>());
  }
}

}  // namespace

double ModelConfig::softmax_scale() const {
  const double mscale = yarn_mscale(rope_scaling.factor, rope_scaling.mscale_all_dim);
  return mscale * mscale / std::sqrt(static_cast<double>(qk_nope_head_dim + qk_rope_head_dim));
}

ModelConfig parse_config(std::string_view text, std::string_view origin) {
  const Json json = parse_json(text, origin);
  const JsonObject in(json, std::string(origin));
  ModelConfig out;
  out.model_type = in.string("model_type");
  if (!is_known(out.model_type)) in.refuse("model_type", kModelTypes);
  out.vocab_size = dimension(in, "vocab_size");
  out.hidden_size = dimension(in, "hidden_size");
  out.intermediate_size = dimension(in, "intermediate_size");
  out.num_hidden_layers = static_cast<int>(in.integer("num_hidden_layers", 1, kMaxLayers));
  out.num_attention_heads = static_cast<int>(in.integer("num_attention_heads", 1, 1 << 16));
  if (in.integer_or("num_key_value_heads", out.num_attention_heads, 1, 1 << 16) != out.num_attention_heads) {
    in.refuse("num_key_value_heads", fmt::format("num_attention_heads = {}", out.num_attention_heads));
  }
  // Readers differ in what a missing rank means; null is the published way to say "no compression".
  if (!in.json().contains("q_lora_rank")) in.fail("q_lora_rank", "the rank, or null for none");
  out.q_lora_rank = static_cast<int>(in.integer_or("q_lora_rank", 0, 0, kMaxDim));
  out.kv_lora_rank = dimension(in, "kv_lora_rank");
  out.qk_nope_head_dim = dimension(in, "qk_nope_head_dim");
  out.qk_rope_head_dim = dimension(in, "qk_rope_head_dim");
  if (out.qk_rope_head_dim % 2 != 0) in.fail("qk_rope_head_dim", "an even number: RoPE turns pairs");
  out.v_head_dim = dimension(in, "v_head_dim");
  out.rms_norm_eps = in.number_or("rms_norm_eps", out.rms_norm_eps, 0.0, 1.0);
  out.max_position_embeddings = in.integer("max_position_embeddings", 1, kMaxTokens);
  out.tie_word_embeddings = in.boolean_or("tie_word_embeddings", false);
  out.attention_bias = in.boolean_or("attention_bias", false);
  if (in.boolean_or("mlp_bias", false)) in.refuse("mlp_bias", "false");
  if (in.string_or("hidden_act", "silu") != "silu") in.refuse("hidden_act", "\"silu\"");
  read_rope(in, out);
  read_experts(in, out);
  read_mlp_types(in, out);
  read_indexer(in, out);
  out.stored = read_stored_format(in);
  read_token_ids(in, out);
  return out;
}

SamplingDefaults read_sampling_defaults(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "generation_config.json";
  SamplingDefaults out;
  if (!std::filesystem::exists(path)) return out;
  const Json json = parse_json(read_file(path), path.string());
  const JsonObject in(json, path.string());
  const auto number = [&](const char* name, double low, double high) {
    return in.has(name) ? std::optional(in.number(name, low, high)) : std::nullopt;
  };
  constexpr double kLeast = std::numeric_limits<double>::min();  // above 0
  out.temperature = number("temperature", 0.0, 1e3);
  out.top_p = number("top_p", kLeast, 1.0);
  out.min_p = number("min_p", 0.0, std::nextafter(1.0, 0.0));
  out.repetition_penalty = number("repetition_penalty", 0.01, 100.0);
  if (in.has("top_k"))
    out.top_k = static_cast<int>(std::max<std::int64_t>(in.integer("top_k", -1, 1 << 30), 0));
  return out;
}

ModelConfig read_config(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "config.json";
  ModelConfig config = parse_config(read_file(path), path.string());
  const std::filesystem::path generation = directory / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    const Json json = parse_json(read_file(generation), generation.string());
    read_token_ids(JsonObject(json, generation.string()), config);
  }
  return config;
}

}  // namespace flash_mla::checkpoint
