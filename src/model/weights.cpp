#include "model/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "base/element.h"
#include "base/parallel.h"
#include "flash_mla/error.h"

namespace flash_mla::model {
namespace {

/// Reads weights in the type that the device takes: float, or std::uint16_t for the bits of bfloat16.
template <class Element>
class Loader {
 public:
  Loader(const ModelConfig& config, const Checkpoint& checkpoint, Ops& ops)
      : config_(config), checkpoint_(checkpoint), ops_(ops) {}

  Weights load() {
    Weights out;
    const Array embedding = matrix("model.embed_tokens.weight", config_.vocab_size, config_.hidden_size);
    out.embedding = ops_.make_table(embedding.get(), config_.vocab_size, config_.hidden_size);
    for (int i = 0; i < config_.num_hidden_layers; ++i) out.layers.push_back(layer(i));
    out.norm = norm("model.norm", config_.hidden_size);
    Array head;
    if (!config_.tie_word_embeddings) {
      head = matrix("lm_head.weight", config_.vocab_size, config_.hidden_size);
    }
    out.lm_head = ops_.make_linear(config_.tie_word_embeddings ? embedding.get() : head.get(),
                                   config_.vocab_size, config_.hidden_size, {});
    return out;
  }

 private:
  using Values = std::vector<float>;
  using Array = std::unique_ptr<Element[]>;  // not set to zero before it is read into

  static Array array(std::int64_t size) {
    return std::make_unique_for_overwrite<Element[]>(static_cast<std::size_t>(size));
  }

  static bool finite(float x) { return std::isfinite(x); }
  static bool finite(std::uint16_t bits) { return (bits & 0x7f80u) != 0x7f80u; }
  static float value(float x) { return x; }
  static float value(std::uint16_t bits) { return to_float(Bf16{bits}); }

  void read_as(const std::string& name, std::int64_t rows, std::int64_t columns, float* out) const {
    checkpoint_.read_float32(name, rows, columns, config_.fp8_block_rows, config_.fp8_block_columns, out);
  }
  void read_as(const std::string& name, std::int64_t rows, std::int64_t columns, std::uint16_t* out) const {
    checkpoint_.read_bfloat16(name, rows, columns, config_.fp8_block_rows, config_.fp8_block_columns, out);
  }

  template <class T>
  void read(const std::string& name, std::int64_t rows, std::int64_t columns, T* out) const {
    read_as(name, rows, columns, out);
    const std::int64_t size = rows * columns, runs = (size + kCheckedRun - 1) / kCheckedRun;
    parallel_for(runs, runs >= 4 ? default_threads() : 1, [&](std::int64_t i) {
      const T* begin = out + i * kCheckedRun;
      const T* end = out + std::min(size, (i + 1) * kCheckedRun);
      // No early end, so that the loop takes many at a time.
      bool good = true;
      for (const T* x = begin; x != end; ++x) good &= finite(*x);
      if (good) return;
      const T* bad = std::find_if(begin, end, [](T x) { return !finite(x); });
      throw InvalidArgument(fmt::format("tensor {} holds {} at row {}, column {}, expected finite weights",
                                        name, value(*bad), (bad - out) / columns, (bad - out) % columns));
    });
  }

  Array matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const {
    Array out = array(rows * columns);
    read(name, rows, columns, out.get());
    return out;
  }

  /// A parameter that stays float32: one-dimensional,
  Values vector(const std::string& name, std::int64_t size) const {
    checkpoint_.get(name, {size});
    return float_matrix(name, 1, size);
  }
  /// or not.
  Values float_matrix(const std::string& name, std::int64_t rows, std::int64_t columns) const {
    Values out(static_cast<std::size_t>(rows * columns));
    read(name, rows, columns, out.data());
    return out;
  }

  Buffer norm(const std::string& name, std::int64_t size) {
    return ops_.make_vector(vector(name + ".weight", size));
  }

  Layer layer(int index) {
    const std::string name = fmt::format("model.layers.{}", index);
    Layer out;
    out.input_norm = norm(name + ".input_layernorm", config_.hidden_size);
    out.attention = attention(name + ".self_attn");
    out.post_attention_norm = norm(name + ".post_attention_layernorm", config_.hidden_size);
    if (config_.is_moe_layer(index)) {
      out.moe = mixture(name + ".mlp");
    } else {
      out.dense = feed_forward(name + ".mlp", config_.intermediate_size);
    }
    return out;
  }

  Attention attention(const std::string& name) {
    const std::int64_t hidden = config_.hidden_size, heads = config_.num_attention_heads;
    const std::int64_t nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
    const std::int64_t rank = config_.kv_lora_rank, q_rank = config_.q_lora_rank, v = config_.v_head_dim;
    const std::int64_t q_width = heads * (nope + rope);
    Attention out;

    const std::int64_t q_rows = q_rank > 0 ? q_rank : q_width, kv_rows = rank + rope;
    const Array qkv = array((q_rows + kv_rows) * hidden);
    read(name + (q_rank > 0 ? ".q_a_proj.weight" : ".q_proj.weight"), q_rows, hidden, qkv.get());
    if (q_rank == 0) pair_rope_rows(qkv.get(), hidden, heads, nope);
    Element* const kv = qkv.get() + q_rows * hidden;
    read(name + ".kv_a_proj_with_mqa.weight", kv_rows, hidden, kv);
    pair_rope_rows(kv, hidden, 1, rank);
    Values bias;
    if (config_.attention_bias) {
      // q_proj has none; q_a_proj has.
      bias = q_rank > 0 ? vector(name + ".q_a_proj.bias", q_rank)
                        : Values(static_cast<std::size_t>(q_rows), 0.0f);
      Values kv_bias = vector(name + ".kv_a_proj_with_mqa.bias", kv_rows);
      pair_rope_rows(kv_bias.data(), 1, 1, rank);
      bias.insert(bias.end(), kv_bias.begin(), kv_bias.end());
    }
    out.qkv_a = ops_.make_linear(qkv.get(), q_rows + kv_rows, hidden, bias);

    if (q_rank > 0) {
      out.q_norm = norm(name + ".q_a_layernorm", q_rank);
      const Array q_b = matrix(name + ".q_b_proj.weight", q_width, q_rank);
      pair_rope_rows(q_b.get(), q_rank, heads, nope);
      out.q_b = ops_.make_linear(q_b.get(), q_width, q_rank, {});
    }
    out.kv_norm = norm(name + ".kv_a_layernorm", rank);
    const Array kv_b = matrix(name + ".kv_b_proj.weight", heads * (nope + v), rank);
    out.kv_b = ops_.make_unquantized_linear(kv_b.get(), heads * (nope + v), rank);
    const auto halves = split_kv_b(config_, static_cast<const Element*>(kv_b.get()));
    out.w_uk = ops_.make_head_linear(halves.uk.data(), heads, rank, nope);
    out.w_uv = ops_.make_head_linear(halves.uv.data(), heads, v, rank);

    const Array o = matrix(name + ".o_proj.weight", hidden, heads * v);
    const Values o_bias = config_.attention_bias ? vector(name + ".o_proj.bias", hidden) : Values();
    out.o = ops_.make_linear(o.get(), hidden, heads * v, o_bias);
    return out;
  }

  /// Where a model pairs rope dimension i with i + rope / 2, reorders the rope rows of every head (which
  /// follow `before` others) so that pairs are neighbours. Queries and keys alike, so their products stay.
  template <class T>
  void pair_rope_rows(T* weight, std::int64_t columns, std::int64_t heads, std::int64_t before) const {
    if (config_.rope_interleave) return;
    const std::int64_t rope = config_.qk_rope_head_dim;
    for (std::int64_t h = 0; h < heads; ++h) {
      T* rows = weight + (h * (before + rope) + before) * columns;
      const std::vector<T> from(rows, rows + rope * columns);
      for (std::int64_t i = 0; i < rope; ++i) {
        std::copy_n(from.data() + (i / 2 + i % 2 * (rope / 2)) * columns, columns, rows + i * columns);
      }
    }
  }

  FeedForward feed_forward(const std::string& name, std::int64_t intermediate) {
    const std::int64_t hidden = config_.hidden_size;
    FeedForward out;
    out.intermediate = intermediate;
    const Array gate_up = array(2 * intermediate * hidden);
    read(name + ".gate_proj.weight", intermediate, hidden, gate_up.get());
    read(name + ".up_proj.weight", intermediate, hidden, gate_up.get() + intermediate * hidden);
    out.gate_up = ops_.make_linear(gate_up.get(), 2 * intermediate, hidden, {});
    const Array down = matrix(name + ".down_proj.weight", hidden, intermediate);
    out.down = ops_.make_linear(down.get(), hidden, intermediate, {});
    return out;
  }

  MixtureOfExperts mixture(const std::string& name) {
    const std::int64_t hidden = config_.hidden_size, intermediate = config_.moe_intermediate_size;
    MixtureOfExperts out;
    const Values router = float_matrix(name + ".gate.weight", config_.n_routed_experts, hidden);
    out.router = ops_.make_router(router.data(), config_.n_routed_experts, hidden);
    if (config_.topk_method == TopkMethod::kNoAuxTc) {
      out.correction_bias =
          ops_.make_vector(vector(name + ".gate.e_score_correction_bias", config_.n_routed_experts));
    }
    const bool fold = ops_.folds_shared_experts() && config_.n_shared_experts > 0;
    SharedExperts shared;
    if (fold) shared = shared_experts(name + ".shared_experts");
    const int num_experts = config_.n_routed_experts + (fold ? config_.n_shared_experts : 0);
    out.experts =
        ops_.make_experts(num_experts, hidden, intermediate, [&](int e, void* gate_up_out, void* down_out) {
          auto* gate_up = static_cast<Element*>(gate_up_out);
          auto* down = static_cast<Element*>(down_out);
          if (e >= config_.n_routed_experts) {
            copy_shared(shared, e - config_.n_routed_experts, gate_up, down);
            return;
          }
          const std::string expert = fmt::format("{}.experts.{}", name, e);
          read(expert + ".gate_proj.weight", intermediate, hidden, gate_up);
          read(expert + ".up_proj.weight", intermediate, hidden, gate_up + intermediate * hidden);
          read(expert + ".down_proj.weight", hidden, intermediate, down);
        });
    if (config_.n_shared_experts > 0 && !fold) {
      out.shared = feed_forward(name + ".shared_experts", config_.n_shared_experts * intermediate);
    }
    return out;
  }

  struct SharedExperts {
    Array gate, up, down;
  };
  SharedExperts shared_experts(const std::string& name) const {
    const std::int64_t hidden = config_.hidden_size;
    const std::int64_t width = std::int64_t{config_.n_shared_experts} * config_.moe_intermediate_size;
    return {matrix(name + ".gate_proj.weight", width, hidden),
            matrix(name + ".up_proj.weight", width, hidden),
            matrix(name + ".down_proj.weight", hidden, width)};
  }
  /// The s-th part of the shared experts, which is an expert of the routed ones' size.
  void copy_shared(const SharedExperts& shared, std::int64_t s, Element* gate_up, Element* down) const {
    const std::int64_t hidden = config_.hidden_size, intermediate = config_.moe_intermediate_size;
    const std::int64_t width = config_.n_shared_experts * intermediate, size = intermediate * hidden;
    std::copy_n(shared.gate.get() + s * size, size, gate_up);
    std::copy_n(shared.up.get() + s * size, size, gate_up + size);
    for (std::int64_t row = 0; row < hidden; ++row) {
      std::copy_n(shared.down.get() + row * width + s * intermediate, intermediate,
                  down + row * intermediate);
    }
  }

  static constexpr std::int64_t kCheckedRun = 1 << 18;

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  Ops& ops_;
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

Weights load_weights(const ModelConfig& config, const Checkpoint& checkpoint, Ops& ops) {
  return ops.takes_bfloat16() ? Loader<std::uint16_t>(config, checkpoint, ops).load()
                              : Loader<float>(config, checkpoint, ops).load();
}

}  // namespace flash_mla::model
