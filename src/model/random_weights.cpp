#include <cmath>
#include <cstdint>
#include <memory>
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

class RandomWeights : public WeightSource {
 public:
  RandomWeights(const ModelConfig& config, bool made_up_by_device, bool with_module)
      : config_(config), made_up_by_device_(made_up_by_device), with_module_(with_module) {}

  Weight embedding() override { return matrix(config_.vocab_size, config_.hidden_size); }

  AttentionWeights attention(int layer) override {
    const std::int64_t hidden = config_.hidden_size, heads = config_.num_attention_heads;
    const std::int64_t nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
    const std::int64_t rank = config_.kv_lora_rank, q_rank = config_.q_lora_rank, v = config_.v_head_dim;
    AttentionWeights out;
    out.norm = ones(hidden);
    out.qkv_a = matrix((q_rank > 0 ? q_rank : heads * (nope + rope)) + rank + rope, hidden);
    if (q_rank > 0) {
      out.q_norm = ones(q_rank);
      out.q_b = matrix(heads * (nope + rope), q_rank);
    }
    out.kv_norm = ones(rank);
    out.kv_b = matrix(heads * (nope + v), rank);
    out.o = matrix(hidden, heads * v);
    if (config_.has_indexer(layer)) {
      const std::int64_t index_heads = config_.index_n_heads, dim = config_.index_head_dim;
      out.indexer = {matrix(index_heads * dim, q_rank), matrix(dim, hidden), ones(dim),
                     std::vector<float>(static_cast<std::size_t>(dim)), matrix(index_heads, hidden)};
    }
    return out;
  }

  FeedForwardWeights feed_forward(int /*layer*/) override {
    return {ones(config_.hidden_size),
            matrix(2 * std::int64_t{config_.intermediate_size}, config_.hidden_size),
            matrix(config_.hidden_size, config_.intermediate_size)};
  }

  MixtureWeights mixture(int /*layer*/) override {
    const std::int64_t hidden = config_.hidden_size, intermediate = config_.moe_intermediate_size;
    MixtureWeights out;
    out.norm = ones(hidden);
    out.router = matrix(config_.n_routed_experts, hidden);
    if (config_.topk_method == TopkMethod::kNoAuxTc) out.correction_bias = ones(config_.n_routed_experts);
    out.intermediate = intermediate;
    if (!made_up_by_device_) {
      out.expert = [=, this](int) {
        return ExpertWeights{matrix(2 * intermediate, hidden), matrix(hidden, intermediate)};
      };
    }
    if (config_.n_shared_experts > 0) {
      const std::int64_t width = config_.n_shared_experts * intermediate;
      out.shared_gate_up = matrix(2 * width, hidden);
      out.shared_down = matrix(hidden, width);
    }
    return out;
  }

  HeadWeights head() override {
    return {ones(config_.hidden_size), matrix(config_.vocab_size, config_.hidden_size)};
  }

  bool has_mtp() const override { return with_module_; }
  MtpWeights mtp() override {
    const std::int64_t hidden = config_.hidden_size;
    return {ones(hidden), ones(hidden), matrix(hidden, 2 * hidden), ones(hidden), ones(hidden)};
  }

 private:
  static std::vector<float> ones(std::int64_t size) {
    return std::vector<float>(static_cast<std::size_t>(size), 1.0f);
  }
  Weight matrix(std::int64_t rows, std::int64_t columns) {
    Weight out;
    out.rows = rows;
    out.columns = columns;
    if (!made_up_by_device_) {
      out.read = [this, size = rows * columns](void* to) { random_.fill(static_cast<float*>(to), size); };
    }
    return out;
  }

  const ModelConfig& config_;
  bool made_up_by_device_, with_module_;
  Random random_;
};

}  // namespace

std::unique_ptr<WeightSource> random_weights(const ModelConfig& config, bool made_up_by_device,
                                             bool with_module) {
  return std::make_unique<RandomWeights>(config, made_up_by_device, with_module);
}

}  // namespace flash_mla::model
