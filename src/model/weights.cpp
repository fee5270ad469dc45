#include "model/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/element.h"
#include "base/parallel.h"
#include "flash_mla/error.h"

namespace flash_mla::model {
namespace {

/// Reads weights in the type that the device takes: float, or std::uint16_t for the bits of bfloat16.
template <class Element>
class CheckpointWeights : public WeightSource {
 public:
  CheckpointWeights(const ModelConfig& config, const Checkpoint& checkpoint, Partition partition)
      : config_(config),
        checkpoint_(checkpoint),
        partition_(std::move(partition)),
        heads_(partition_.heads(config)) {}

  Weight embedding() override {
    return matrix("model.embed_tokens.weight", config_.vocab_size, config_.hidden_size);
  }

  AttentionWeights attention(int layer) override {
    const std::string name = fmt::format("model.layers.{}", layer), self = name + ".self_attn";
    const std::int64_t hidden = config_.hidden_size, heads = config_.num_attention_heads;
    const std::int64_t nope = config_.qk_nope_head_dim, rank = config_.kv_lora_rank;
    const std::int64_t q_rank = config_.q_lora_rank, v = config_.v_head_dim;
    AttentionWeights out;
    out.norm = norm(name + ".input_layernorm", hidden);
    out.qkv_a = qkv_a(self);
    if (config_.attention_bias) out.qkv_a_bias = qkv_a_bias(self);
    if (q_rank > 0) {
      out.q_norm = norm(self + ".q_a_layernorm", q_rank);
      out.q_b = matrix(q_rank, {{self + ".q_b_proj.weight", q_width(), of_heads(q_head_rows())}},
                       [this, nope](auto* to, std::int64_t width) {
                         this->pair_rope_rows(to, width, heads_.count, nope);
                       });
    }
    out.kv_norm = norm(self + ".kv_a_layernorm", rank);
    out.kv_b = matrix(rank, {{self + ".kv_b_proj.weight", heads * (nope + v), of_heads(nope + v)}});
    out.o = reducing(self + ".o_proj.weight", hidden, heads * v, of_heads(v));
    if (config_.attention_bias) out.o_bias = o_bias(self + ".o_proj.bias", hidden);
    if (config_.has_indexer(layer)) out.indexer = indexer(self + ".indexer");
    return out;
  }

  FeedForwardWeights feed_forward(int layer) override {
    const std::string mlp = fmt::format("model.layers.{}.mlp", layer);
    FeedForwardWeights out;
    out.norm = post_attention_norm(layer);
    out.gate_up = gate_up(mlp, config_.intermediate_size);
    out.down = down(mlp, config_.intermediate_size);
    return out;
  }

  MixtureWeights mixture(int layer) override {
    const std::string mlp = fmt::format("model.layers.{}.mlp", layer);
    const std::int64_t hidden = config_.hidden_size, experts = config_.n_routed_experts;
    const std::int64_t intermediate = config_.moe_intermediate_size;
    MixtureWeights out;
    out.norm = post_attention_norm(layer);
    out.router.rows = experts;
    out.router.columns = hidden;
    out.router.read = [=, this](void* to) {
      read(mlp + ".gate.weight", experts, hidden, static_cast<float*>(to));
    };
    if (config_.topk_method == TopkMethod::kNoAuxTc) {
      out.correction_bias = vector(mlp + ".gate.e_score_correction_bias", experts);
    }
    out.intermediate = intermediate;
    if (partition_.experts) out.ranks = partition_.experts->layer(layer);
    out.expert = [=, this](int e) {
      const std::string expert = fmt::format("{}.experts.{}", mlp, e);
      return ExpertWeights{gate_up(expert, intermediate, {0, intermediate}),
                           matrix(expert + ".down_proj.weight", hidden, intermediate)};
    };
    if (config_.n_shared_experts > 0) {
      out.shared_gate_up = gate_up(mlp + ".shared_experts", config_.n_shared_experts * intermediate);
      out.shared_down = down(mlp + ".shared_experts", config_.n_shared_experts * intermediate);
    }
    return out;
  }

  HeadWeights head() override {
    const std::string name = config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
    return {norm("model.norm", config_.hidden_size),
            matrix(config_.hidden_size, {{name, config_.vocab_size, partition_.share(config_.vocab_size)}})};
  }

  bool has_mtp() const override { return has_module(config_, checkpoint_); }

  MtpWeights mtp() override {
    const std::int64_t hidden = config_.hidden_size;
    return {norm(mtp_name() + ".enorm", hidden), norm(mtp_name() + ".hnorm", hidden),
            matrix(mtp_name() + ".eh_proj.weight", hidden, 2 * hidden), norm("model.norm", hidden),
            norm(mtp_name() + ".shared_head.norm", hidden)};
  }

 private:
  using Values = std::vector<float>;
  using Window = checkpoint::WeightWindow;

  std::string mtp_name() const { return fmt::format("model.layers.{}", config_.num_hidden_layers); }

  static bool finite(float x) { return std::isfinite(x); }
  static bool finite(std::uint16_t bits) { return (bits & 0x7f80u) != 0x7f80u; }
  static float value(float x) { return x; }
  static float value(std::uint16_t bits) { return to_float(Bf16{bits}); }

  void read_as(const std::string& name, std::int64_t rows, std::int64_t columns, const Window& window,
               float* out) const {
    checkpoint_.read_float32(name, rows, columns, config_.stored, out, window);
  }
  void read_as(const std::string& name, std::int64_t rows, std::int64_t columns, const Window& window,
               std::uint16_t* out) const {
    checkpoint_.read_bfloat16(name, rows, columns, config_.stored, out, window);
  }

  template <class T>
  void read(const std::string& name, std::int64_t rows, std::int64_t columns, T* out) const {
    read(name, rows, columns, {0, rows, 0, columns}, out);
  }
  template <class T>
  void read(const std::string& name, std::int64_t rows, std::int64_t columns, const Window& window,
            T* out) const {
    read_as(name, rows, columns, window, out);
    const std::int64_t size = window.rows * window.columns, runs = (size + kCheckedRun - 1) / kCheckedRun;
    parallel_for(runs, runs >= 4 ? default_threads() : 1, [&](std::int64_t i) {
      const T* begin = out + i * kCheckedRun;
      const T* end = out + std::min(size, (i + 1) * kCheckedRun);
      // No early end, so that the loop takes many at a time.
      bool good = true;
      for (const T* x = begin; x != end; ++x) good &= finite(*x);
      if (good) return;
      const T* bad = std::find_if(begin, end, [](T x) { return !finite(x); });
      throw InvalidArgument(fmt::format("tensor {} holds {} at row {}, column {}, expected finite weights",
                                        name, value(*bad), window.first_row + (bad - out) / window.columns,
                                        window.first_column + (bad - out) % window.columns));
    });
  }

  /// Tensors that lie one above the other in a weight, and which of their rows are in it.
  struct Part {
    Part(std::string tensor, std::int64_t num_rows) : Part(std::move(tensor), num_rows, {0, num_rows}) {}
    Part(std::string tensor, std::int64_t num_rows, Range kept_rows)
        : name(std::move(tensor)), rows(num_rows), kept(kept_rows) {}
    std::string name;
    std::int64_t rows;
    Range kept;
  };
  /// Parts of `columns` columns, of which the weight has `kept`. `arrange` puts the rows of all of it in order: it gets
  /// them, `width` elements each, of any type.
  template <class Arrange>
  Weight matrix(std::int64_t columns, std::vector<Part> parts, Arrange arrange, Range kept) const {
    Weight out;
    out.columns = kept.count;
    for (const Part& part : parts) {
      out.rows += part.kept.count;
      out.tensors.push_back(part.name);
    }
    const auto window = [kept](const Part& part) {
      return Window{part.kept.first, part.kept.count, kept.first, kept.count};
    };
    out.stored = stored_format(columns, parts);
    if (out.stored && (kept.first % out.stored->group != 0)) out.stored = std::nullopt;
    if (out.stored) {
      out.read_quantized = [=, this, groups = out.stored->groups(kept.count)](std::uint8_t* codes,
                                                                              float* scales) {
        std::int64_t row = 0;
        for (const Part& part : parts) {
          checkpoint_.read_quantized(part.name, part.rows, columns, config_.stored, codes + row * kept.count,
                                     scales + row * groups, window(part));
          row += part.kept.count;
        }
        arrange(codes, kept.count);
        arrange(scales, groups);
      };
    }
    out.read = [=, this](void* to) {
      auto* const begin = static_cast<Element*>(to);
      Element* at = begin;
      for (const Part& part : parts) {
        read(part.name, part.rows, columns, window(part), at);
        at += part.kept.count * kept.count;
      }
      arrange(begin, kept.count);
    };
    return out;
  }
  template <class Arrange>
  Weight matrix(std::int64_t columns, std::vector<Part> parts, Arrange arrange) const {
    return matrix(columns, std::move(parts), arrange, {0, columns});
  }
  Weight matrix(std::int64_t columns, std::vector<Part> parts) const {
    return matrix(columns, std::move(parts), [](auto*, std::int64_t) {});
  }
  Weight matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const {
    return matrix(columns, {{name, rows}});
  }
  /// Of a product over features that ranks have in parts, `own` being this one's.
  Weight reducing(const std::string& name, std::int64_t rows, std::int64_t columns, Range own) const {
    if (partition_.exact) return matrix(columns, {{name, rows, partition_.share(rows)}});
    return matrix(
        columns, {{name, rows}}, [](auto*, std::int64_t) {}, own);
  }

  /// The form that all parts are stored in, or none.
  std::optional<QuantizedFormat> stored_format(std::int64_t columns, const std::vector<Part>& parts) const {
    if (config_.stored == checkpoint::StoredFormat()) return std::nullopt;
    std::optional<QuantizedFormat> out;
    for (const Part& part : parts) {
      const auto format = checkpoint_.quantized_format(part.name, part.rows, columns, config_.stored);
      if (!format || (out && *out != *format)) return std::nullopt;
      out = format;
    }
    return out;
  }

  /// A parameter that stays float32.
  Values vector(const std::string& name, std::int64_t size) const {
    checkpoint_.get(name, {size});
    Values out(static_cast<std::size_t>(size));
    read(name, 1, size, out.data());
    return out;
  }
  Values norm(const std::string& name, std::int64_t size) const { return vector(name + ".weight", size); }
  Values post_attention_norm(int layer) const {
    return norm(fmt::format("model.layers.{}.post_attention_layernorm", layer), config_.hidden_size);
  }

  std::int64_t q_head_rows() const { return config_.qk_nope_head_dim + config_.qk_rope_head_dim; }
  std::int64_t q_width() const { return config_.num_attention_heads * q_head_rows(); }
  /// Those of `each` rows a head that are of this rank's heads.
  Range of_heads(std::int64_t each) const { return {heads_.first * each, heads_.count * each}; }
  std::int64_t q_a_rows() const { return config_.q_lora_rank > 0 ? config_.q_lora_rank : q_width(); }
  std::int64_t kv_a_rows() const { return config_.kv_lora_rank + config_.qk_rope_head_dim; }

  Weight qkv_a(const std::string& name) const {
    const bool direct = config_.q_lora_rank == 0;
    const Range q = direct ? of_heads(q_head_rows()) : Range{0, q_a_rows()};
    return matrix(config_.hidden_size,
                  {{name + (direct ? ".q_proj.weight" : ".q_a_proj.weight"), q_a_rows(), q},
                   {name + ".kv_a_proj_with_mqa.weight", kv_a_rows()}},
                  [=, this](auto* rows, std::int64_t width) {
                    if (direct) pair_rope_rows(rows, width, heads_.count, config_.qk_nope_head_dim);
                    pair_rope_rows(rows + q.count * width, width, 1, config_.kv_lora_rank);
                  });
  }

  IndexerWeights indexer(const std::string& name) const {
    const std::int64_t heads = config_.index_n_heads, dim = config_.index_head_dim;
    const std::int64_t hidden = config_.hidden_size, q_rank = config_.q_lora_rank;
    IndexerWeights out;
    out.q_b =
        matrix(q_rank, {{name + ".wq_b.weight", heads * dim}},
               [this, heads](auto* to, std::int64_t width) { this->pair_index_rows(to, width, heads); });
    out.k = matrix(hidden, {{name + ".wk.weight", dim}},
                   [this](auto* to, std::int64_t width) { this->pair_index_rows(to, width, 1); });
    out.k_norm = norm(name + ".k_norm", dim);
    out.k_norm_bias = vector(name + ".k_norm.bias", dim);
    pair_index_rows(out.k_norm.data(), 1, 1);
    pair_index_rows(out.k_norm_bias.data(), 1, 1);
    out.head_weights.rows = heads;
    out.head_weights.columns = hidden;
    out.head_weights.read = [=, this](void* to) {
      read(name + ".weights_proj.weight", heads, hidden, static_cast<float*>(to));
    };
    return out;
  }

  Values qkv_a_bias(const std::string& name) const {
    // q_proj has none; q_a_proj has.
    Values out = config_.q_lora_rank > 0
                     ? vector(name + ".q_a_proj.bias", config_.q_lora_rank)
                     : Values(static_cast<std::size_t>(of_heads(q_head_rows()).count), 0.0f);
    Values kv = vector(name + ".kv_a_proj_with_mqa.bias", kv_a_rows());
    pair_rope_rows(kv.data(), 1, 1, config_.kv_lora_rank);
    out.insert(out.end(), kv.begin(), kv.end());
    return out;
  }

  /// Of a sum over ranks rank 0 adds the bias.
  Values o_bias(const std::string& name, std::int64_t hidden) const {
    const Values all = vector(name, hidden);
    if (!partition_.exact) return partition_.rank == 0 ? all : Values();
    const Range own = partition_.share(hidden);
    return {all.begin() + own.first, all.begin() + own.end()};
  }

  Weight gate_up(const std::string& name, std::int64_t intermediate, Range own) const {
    return matrix(config_.hidden_size, {{name + ".gate_proj.weight", intermediate, own},
                                        {name + ".up_proj.weight", intermediate, own}});
  }
  Weight gate_up(const std::string& name, std::int64_t intermediate) const {
    return gate_up(name, intermediate, partition_.share(intermediate));
  }
  Weight down(const std::string& name, std::int64_t intermediate) const {
    return reducing(name + ".down_proj.weight", config_.hidden_size, intermediate,
                    partition_.share(intermediate));
  }

  /// Where a model pairs rope dimension i with i + rope / 2, reorders the rope rows of every head (which
  /// follow `before` others) so that pairs are neighbours. Queries and keys alike, so their products stay.
  template <class T>
  void pair_rope_rows(T* weight, std::int64_t columns, std::int64_t heads, std::int64_t before) const {
    if (config_.rope_interleave) return;
    pair_rows(weight + before * columns, columns, heads, before + config_.qk_rope_head_dim);
  }
  /// The same for the indexer, whose rope rows come first in a head.
  template <class T>
  void pair_index_rows(T* weight, std::int64_t columns, std::int64_t heads) const {
    if (!config_.indexer_rope_interleave) pair_rows(weight, columns, heads, config_.index_head_dim);
  }
  template <class T>
  void pair_rows(T* weight, std::int64_t columns, std::int64_t heads, std::int64_t head_rows) const {
    const std::int64_t rope = config_.qk_rope_head_dim;
    for (std::int64_t h = 0; h < heads; ++h) {
      T* rows = weight + h * head_rows * columns;
      const std::vector<T> from(rows, rows + rope * columns);
      for (std::int64_t i = 0; i < rope; ++i) {
        std::copy_n(from.data() + (i / 2 + i % 2 * (rope / 2)) * columns, columns, rows + i * columns);
      }
    }
  }

  static constexpr std::int64_t kCheckedRun = 1 << 18;

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  const Partition partition_;
  const Range heads_;  ///< this rank's
};

}  // namespace

template <class Element>
AbsorbedHalves<Element> split_kv_b(const ModelConfig& config, const Element* kv_b) {
  const std::int64_t heads = config.num_attention_heads, rank = config.kv_lora_rank;
  const std::int64_t nope = config.qk_nope_head_dim, v = config.v_head_dim;
  AbsorbedHalves<Element> out;
  out.uk.resize(static_cast<std::size_t>(heads * rank * nope));
  out.uv.resize(static_cast<std::size_t>(heads * v * rank));
  for (std::int64_t h = 0; h < heads; ++h) {
    const Element* from = kv_b + h * (nope + v) * rank;
    Element* to = out.uk.data() + h * rank * nope;
    for (std::int64_t i = 0; i < nope; ++i) {
      for (std::int64_t r = 0; r < rank; ++r) to[r * nope + i] = from[i * rank + r];
    }
    std::copy_n(from + nope * rank, v * rank, out.uv.data() + h * v * rank);
  }
  return out;
}
template AbsorbedHalves<float> split_kv_b(const ModelConfig&, const float*);
template AbsorbedHalves<std::uint16_t> split_kv_b(const ModelConfig&, const std::uint16_t*);

// Where layers share an index it is not known whose the module's layer would have.
bool has_module(const ModelConfig& config, const Checkpoint& checkpoint) {
  return config.shares_index.empty() &&
         checkpoint.contains(fmt::format("model.layers.{}.eh_proj.weight", config.num_hidden_layers));
}

std::unique_ptr<WeightSource> checkpoint_weights(const ModelConfig& config, const Checkpoint& checkpoint,
                                                 DType dtype, const Partition& partition) {
  if (dtype == DType::kFloat32) {
    return std::make_unique<CheckpointWeights<float>>(config, checkpoint, partition);
  }
  return std::make_unique<CheckpointWeights<std::uint16_t>>(config, checkpoint, partition);
}

}  // namespace flash_mla::model
