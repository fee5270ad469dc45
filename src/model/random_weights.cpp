#include <vector>

#include "flash_mla/error.h"
#include "model/weights.h"

namespace flash_mla::model {
namespace {

class Maker {
 public:
  Maker(const ModelConfig& config, Ops& ops) : config_(config), ops_(ops) {}

  Weights make() {
    Weights out;
    out.embedding = ops_.make_table(nullptr, config_.vocab_size, config_.hidden_size);
    for (int i = 0; i < config_.num_hidden_layers; ++i) out.layers.push_back(layer(i));
    out.norm = ones(config_.hidden_size);
    out.lm_head = linear(config_.vocab_size, config_.hidden_size);
    return out;
  }

 private:
  Buffer ones(std::int64_t size) {
    return ops_.make_vector(std::vector<float>(static_cast<std::size_t>(size), 1.0f));
  }
  std::unique_ptr<Linear> linear(std::int64_t out_features, std::int64_t in_features) {
    return ops_.make_linear(nullptr, out_features, in_features, {});
  }

  Layer layer(int index) {
    Layer out;
    out.input_norm = ones(config_.hidden_size);
    out.attention = attention();
    out.post_attention_norm = ones(config_.hidden_size);
    if (config_.is_moe_layer(index)) {
      out.moe = mixture();
    } else {
      out.dense = feed_forward(config_.intermediate_size);
    }
    return out;
  }

  Attention attention() {
    const std::int64_t hidden = config_.hidden_size, heads = config_.num_attention_heads;
    const std::int64_t nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
    const std::int64_t rank = config_.kv_lora_rank, q_rank = config_.q_lora_rank, v = config_.v_head_dim;
    Attention out;
    out.qkv_a = linear((q_rank > 0 ? q_rank : heads * (nope + rope)) + rank + rope, hidden);
    if (q_rank > 0) {
      out.q_norm = ones(q_rank);
      out.q_b = linear(heads * (nope + rope), q_rank);
    }
    out.kv_norm = ones(rank);
    out.kv_b = linear(heads * (nope + v), rank);
    // Not the halves of kv_b: the two forms of attention are different functions of a random model.
    out.w_uk = ops_.make_head_linear(nullptr, heads, rank, nope);
    out.w_uv = ops_.make_head_linear(nullptr, heads, v, rank);
    out.o = linear(hidden, heads * v);
    return out;
  }

  FeedForward feed_forward(std::int64_t intermediate) {
    FeedForward out;
    out.intermediate = intermediate;
    out.gate_up = linear(2 * intermediate, config_.hidden_size);
    out.down = linear(config_.hidden_size, intermediate);
    return out;
  }

  MixtureOfExperts mixture() {
    const std::int64_t hidden = config_.hidden_size, intermediate = config_.moe_intermediate_size;
    MixtureOfExperts out;
    out.router = ops_.make_router(nullptr, config_.n_routed_experts, hidden);
    if (config_.topk_method == TopkMethod::kNoAuxTc) out.correction_bias = ones(config_.n_routed_experts);
    const bool fold = ops_.folds_shared_experts();
    out.experts = ops_.make_experts(config_.n_routed_experts + (fold ? config_.n_shared_experts : 0), hidden,
                                    intermediate, {});
    if (config_.n_shared_experts > 0 && !fold)
      out.shared = feed_forward(config_.n_shared_experts * intermediate);
    return out;
  }

  const ModelConfig& config_;
  Ops& ops_;
};

}  // namespace

Weights random_weights(const ModelConfig& config, Ops& ops) {
  if (!ops.makes_up_weights()) {
    throw Unsupported("random weights are made by the GPU; device cpu has none, use cuda");
  }
  return Maker(config, ops).make();
}

}  // namespace flash_mla::model
