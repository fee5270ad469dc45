#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "model/weights.h"

namespace flash_mla::model {
namespace {

// Standard deviation, as where a device makes up its own.
constexpr float kDeviation = 0.02f;

/// The i-th of a sequence of uniform numbers by SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014), for i from `first` on: a billion of them take some seconds.
void fill(std::uint64_t first, float* out, std::int64_t count) {
  const float width = kDeviation * std::sqrt(12.0f);
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t x = (first + static_cast<std::uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    out[i] = (static_cast<float>(x >> 40) * 0x1p-24f - 0.5f) * width;
  }
}

class RandomWeights : public WeightSource {
 public:
  RandomWeights(const ModelConfig& config, bool made_up_by_device, bool with_module, Partition partition)
      : config_(config),
        made_up_by_device_(made_up_by_device),
        with_module_(with_module),
        partition_(std::move(partition)) {}

  Weight embedding() override { return matrix(config_.vocab_size, config_.hidden_size); }

  AttentionWeights attention(int layer) override {
    const std::int64_t hidden = config_.hidden_size, heads = config_.num_attention_heads;
    const std::int64_t nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
    const std::int64_t rank = config_.kv_lora_rank, q_rank = config_.q_lora_rank, v = config_.v_head_dim;
    const Range own = partition_.heads(config_);
    const Range q = {own.first * (nope + rope), own.count * (nope + rope)};
    AttentionWeights out;
    out.norm = ones(hidden);
    const Part kv_a{rank + rope, {0, rank + rope}};
    out.qkv_a = q_rank > 0 ? matrix({Part{q_rank, {0, q_rank}}, kv_a}, hidden)
                           : matrix({Part{heads * (nope + rope), q}, kv_a}, hidden);
    if (q_rank > 0) {
      out.q_norm = ones(q_rank);
      out.q_b = matrix({Part{heads * (nope + rope), q}}, q_rank);
    }
    out.kv_norm = ones(rank);
    out.kv_b = matrix({Part{heads * (nope + v), {own.first * (nope + v), own.count * (nope + v)}}}, rank);
    out.o = reducing(hidden, heads * v, {own.first * v, own.count * v});
    if (config_.has_indexer(layer)) {
      const std::int64_t index_heads = config_.index_n_heads, dim = config_.index_head_dim;
      out.indexer = {matrix(index_heads * dim, q_rank), matrix(dim, hidden), ones(dim),
                     std::vector<float>(static_cast<std::size_t>(dim)), matrix(index_heads, hidden)};
    }
    return out;
  }

  FeedForwardWeights feed_forward(int /*layer*/) override {
    return {ones(config_.hidden_size), gate_up(config_.intermediate_size), down(config_.intermediate_size)};
  }

  MixtureWeights mixture(int layer) override {
    const std::int64_t hidden = config_.hidden_size, intermediate = config_.moe_intermediate_size;
    MixtureWeights out;
    out.norm = ones(hidden);
    out.router = matrix(config_.n_routed_experts, hidden);
    if (config_.topk_method == TopkMethod::kNoAuxTc) out.correction_bias = ones(config_.n_routed_experts);
    out.intermediate = intermediate;
    if (partition_.experts) out.ranks = partition_.experts->layer(layer);
    if (!made_up_by_device_) {
      out.expert = [=, this, first = next_](int e) {
        const std::uint64_t gate_up = first + static_cast<std::uint64_t>(3 * hidden * intermediate * e);
        return ExpertWeights{matrix_at(gate_up, {Part{2 * intermediate, {0, 2 * intermediate}}}, hidden),
                             matrix_at(gate_up + static_cast<std::uint64_t>(2 * hidden * intermediate),
                                       {Part{hidden, {0, hidden}}}, intermediate)};
      };
    }
    next_ += static_cast<std::uint64_t>(3 * hidden * intermediate * config_.n_routed_experts);
    if (config_.n_shared_experts > 0) {
      const std::int64_t width = config_.n_shared_experts * intermediate;
      out.shared_gate_up = gate_up(width);
      out.shared_down = down(width);
    }
    return out;
  }

  HeadWeights head() override {
    const std::int64_t vocab = config_.vocab_size;
    return {ones(config_.hidden_size), matrix({Part{vocab, partition_.share(vocab)}}, config_.hidden_size)};
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
  /// Rows of a matrix, those `kept` of them in the weight.
  struct Part {
    std::int64_t rows;
    Range kept;
  };
  /// Parts above each other, of whose columns `kept` are in the weight; their numbers begin at `first`.
  Weight matrix_at(std::uint64_t first, const std::vector<Part>& parts, std::int64_t columns,
                   std::optional<Range> kept = std::nullopt) const {
    const Range own = kept.value_or(Range{0, columns});
    Weight out;
    out.columns = own.count;
    for (const Part& part : parts) out.rows += part.kept.count;
    if (made_up_by_device_) return out;
    out.read = [=](void* to) {
      auto* at = static_cast<float*>(to);
      std::uint64_t number = first;
      for (const Part& part : parts) {
        for (std::int64_t row = part.kept.first; row < part.kept.end(); ++row, at += own.count)
          fill(number + static_cast<std::uint64_t>(row * columns + own.first), at, own.count);
        number += static_cast<std::uint64_t>(part.rows * columns);
      }
    };
    return out;
  }
  Weight matrix(const std::vector<Part>& parts, std::int64_t columns,
                std::optional<Range> kept = std::nullopt) {
    const std::uint64_t first = next_;
    for (const Part& part : parts) next_ += static_cast<std::uint64_t>(part.rows * columns);
    return matrix_at(first, parts, columns, kept);
  }
  Weight matrix(std::int64_t rows, std::int64_t columns) { return matrix({Part{rows, {0, rows}}}, columns); }
  /// As of a checkpoint: rows of an exact partition, else columns.
  Weight reducing(std::int64_t rows, std::int64_t columns, Range own) {
    if (partition_.exact) return matrix({Part{rows, partition_.share(rows)}}, columns);
    return matrix({Part{rows, {0, rows}}}, columns, own);
  }
  Weight gate_up(std::int64_t intermediate) {
    const Part half{intermediate, partition_.share(intermediate)};
    return matrix({half, half}, config_.hidden_size);
  }
  Weight down(std::int64_t intermediate) {
    return reducing(config_.hidden_size, intermediate, partition_.share(intermediate));
  }

  const ModelConfig& config_;
  bool made_up_by_device_, with_module_;
  const Partition partition_;
  std::uint64_t next_ = 0;  ///< of the numbers that are no matrix's yet
};

}  // namespace

std::unique_ptr<WeightSource> random_weights(const ModelConfig& config, bool made_up_by_device,
                                             bool with_module, const Partition& partition) {
  return std::make_unique<RandomWeights>(config, made_up_by_device, with_module, partition);
}

}  // namespace flash_mla::model
