#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "model/weights.h"

namespace flash_mla::model {
namespace {

// Standard deviation, as where a device makes up its own.
constexpr float kDeviation = 0.02f;

/// Uniform numbers by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
/// 2014): a billion of them take some seconds.
class Random {
 public:
  void fill(float* out, std::int64_t count) {
    const float width = kDeviation * std::sqrt(12.0f);
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint64_t x = state_ += 0x9e3779b97f4a7c15u;
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
      x ^= x >> 31;
      out[i] = (static_cast<float>(x >> 40) * 0x1p-24f - 0.5f) * width;
    }
  }

 private:
  std::uint64_t state_ = 0;
};

class Maker {
 public:
  Maker(const ModelConfig& config, Ops& ops) : config_(config), ops_(ops) {}

  Weights make() {
    Weights out;
    out.embedding = ops_.make_table(values(std::int64_t{config_.vocab_size} * config_.hidden_size),
                                    config_.vocab_size, config_.hidden_size);
    for (int i = 0; i < config_.num_hidden_layers; ++i) out.layers.push_back(layer(i));
    out.norm = ones(config_.hidden_size);
    out.lm_head = linear(config_.vocab_size, config_.hidden_size);
    return out;
  }

 private:
  Buffer ones(std::int64_t size) {
    return ops_.make_vector(std::vector<float>(static_cast<std::size_t>(size), 1.0f));
  }
  /// Random ones until the next call, or null where the device makes up its own.
  const float* values(std::int64_t count) {
    if (ops_.makes_up_weights()) return nullptr;
    values_.resize(static_cast<std::size_t>(count));
    random_.fill(values_.data(), count);
    return values_.data();
  }
  std::unique_ptr<Linear> linear(std::int64_t out_features, std::int64_t in_features) {
    return ops_.make_linear(values(out_features * in_features), out_features, in_features, {});
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
    const float* kv_b = values(heads * (nope + v) * rank);
    out.kv_b = ops_.make_unquantized_linear(kv_b, heads * (nope + v), rank);
    // Made up by the device they are not the halves of kv_b: the two forms of attention are different
    // functions of such a model.
    AbsorbedHalves<float> halves;
    if (kv_b != nullptr) halves = split_kv_b(config_, kv_b);
    out.w_uk = ops_.make_head_linear(kv_b == nullptr ? nullptr : halves.uk.data(), heads, rank, nope);
    out.w_uv = ops_.make_head_linear(kv_b == nullptr ? nullptr : halves.uv.data(), heads, v, rank);
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
    out.router =
        ops_.make_router(values(config_.n_routed_experts * hidden), config_.n_routed_experts, hidden);
    if (config_.topk_method == TopkMethod::kNoAuxTc) out.correction_bias = ones(config_.n_routed_experts);
    const bool fold = ops_.folds_shared_experts();
    std::function<void(int, void*, void*)> read;
    if (!ops_.makes_up_weights()) {
      read = [&](int, void* gate_up, void* down) {
        random_.fill(static_cast<float*>(gate_up), 2 * intermediate * hidden);
        random_.fill(static_cast<float*>(down), hidden * intermediate);
      };
    }
    out.experts = ops_.make_experts(config_.n_routed_experts + (fold ? config_.n_shared_experts : 0), hidden,
                                    intermediate, read);
    if (config_.n_shared_experts > 0 && !fold)
      out.shared = feed_forward(config_.n_shared_experts * intermediate);
    return out;
  }

  const ModelConfig& config_;
  Ops& ops_;
  Random random_;
  std::vector<float> values_;
};

}  // namespace

Weights random_weights(const ModelConfig& config, Ops& ops) { return Maker(config, ops).make(); }

}  // namespace flash_mla::model
