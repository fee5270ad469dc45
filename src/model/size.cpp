#include "model/size.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "base/page_size.h"
#include "flash_mla/error.h"
#include "kv/format.h"
#include "model/e4m3_weight.h"
#include "model/int4_weight.h"
#include "model/quantized_layers.h"

namespace flash_mla::model {

namespace {

constexpr double kGiB = 1 << 30;
constexpr double kDeviceWide = 2;  // bytes of bfloat16

/// How many there are of each.
struct Weights {
  double embedding = 0, head = 0, attention = 0, kv_b = 0, dense = 0, shared = 0, experts = 0;
  double all() const { return embedding + head + attention + kv_b + dense + shared + experts; }
  /// Of ranks that share the routed experts alone.
  Weights on_ranks(int n) const {
    return {n * embedding, n * head, n * attention, n * kv_b, n * dense, n * shared, experts};
  }
};

/// Adds a layer's attention.
void add_attention(const checkpoint::ModelConfig& c, bool indexer, Weights& out) {
  const double hidden = c.hidden_size, heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const double nope = c.qk_nope_head_dim, rope = c.qk_rope_head_dim, v = c.v_head_dim;
  const double q =
      c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + heads * (nope + rope)) : hidden * heads * (nope + rope);
  out.attention += q + (rank + rope) * hidden + heads * v * hidden;
  out.kv_b += heads * rank * (nope + v);
  if (!indexer) return;
  out.attention += double{1} * c.index_n_heads * (c.index_head_dim * double{1} * c.q_lora_rank + hidden) +
                   c.index_head_dim * hidden;
}

void add_experts(const checkpoint::ModelConfig& c, Weights& out) {
  const double expert = 3 * double{1} * c.hidden_size * c.moe_intermediate_size;
  out.shared += expert * c.n_shared_experts;
  out.experts += expert * c.n_routed_experts;
}

/// Of the first `layers` layers, the embedding and, with all layers, the LM head.
Weights count_weights(const checkpoint::ModelConfig& c, int layers) {
  const double hidden = c.hidden_size;
  Weights out;
  out.embedding = hidden * c.vocab_size;
  if (layers == c.num_hidden_layers && !c.tie_word_embeddings) out.head = hidden * c.vocab_size;
  for (int i = 0; i < layers; ++i) {
    add_attention(c, c.has_indexer(i), out);
    if (c.is_moe_layer(i)) {
      add_experts(c, out);
    } else {
      out.dense += 3 * hidden * c.intermediate_size;
    }
  }
  return out;
}

/// Of the module for multi-token prediction, whose projection is as a dense layer's.
Weights count_module_weights(const checkpoint::ModelConfig& c) {
  Weights out;
  add_attention(c, c.index_topk > 0, out);
  add_experts(c, out);
  out.dense = 2.0 * c.hidden_size * c.hidden_size;
  return out;
}

/// As the checkpoint has its products, by its configuration.
std::optional<QuantizedFormat> stored_format(const checkpoint::ModelConfig& c) {
  if (c.stored.fp8_block_columns > 0)
    return QuantizedFormat{QuantizedType::kE4m3, c.stored.fp8_block_columns};
  if (c.stored.int4_group == 0) return std::nullopt;
  return QuantizedFormat{QuantizedType::kInt4, c.stored.int4_group > 0 ? c.stored.int4_group : c.hidden_size};
}

/// With `wide` bytes for each that is never quantised, and bytes_each(kind) for the others.
template <class F>
double sum_bytes(const Weights& w, double wide, const F& bytes_each) {
  return wide * (w.embedding + w.kv_b) + bytes_each(LayerKind::kAttention) * w.attention +
         bytes_each(LayerKind::kDense) * w.dense + bytes_each(LayerKind::kShared) * w.shared +
         bytes_each(LayerKind::kExperts) * w.experts + bytes_each(LayerKind::kHead) * w.head;
}

}  // namespace

double num_weights(const checkpoint::ModelConfig& c) { return count_weights(c, c.num_hidden_layers).all(); }

double num_module_weights(const checkpoint::ModelConfig& c) { return count_module_weights(c).all(); }

double num_weights_before(const checkpoint::ModelConfig& c, int layers) {
  const Weights w = count_weights(c, layers);
  return w.all() - w.head;
}

double weight_bytes(const checkpoint::ModelConfig& c, DType dtype, ModelQuantize quantize, int dp) {
  return sum_bytes(count_weights(c, c.num_hidden_layers).on_ranks(dp), static_cast<double>(dtype_size(dtype)),
                   [&](LayerKind kind) { return bytes_each(c, dtype, quantize, kind); });
}

double bytes_each(const checkpoint::ModelConfig& c, DType dtype, ModelQuantize quantize, LayerKind kind) {
  if (quantize == ModelQuantize::kInt8) return 1;
  std::optional<QuantizedFormat> format = quantized_format(quantize, kind);
  if (!format && kind != LayerKind::kHead) format = stored_format(c);
  if (!format) return static_cast<double>(dtype_size(dtype));
  const double bits = format->type == QuantizedType::kInt4 ? 0.5 : 1.0;
  return bits + static_cast<double>(sizeof(float)) / static_cast<double>(format->group);
}

double device_bytes_each(const checkpoint::ModelConfig& c, ModelQuantize quantize, LayerKind kind) {
  constexpr double kE4m3 = 1 + static_cast<double>(sizeof(float)) / (kE4m3Rows * kE4m3Columns);
  const bool stored = c.stored.fp8_block_columns > 0 && c.stored.fp8_block_columns % kE4m3Columns == 0 &&
                      c.stored.fp8_block_rows % kE4m3Rows == 0;
  constexpr double kInt4 = 0.5 + static_cast<double>(sizeof(float)) / static_cast<double>(kInt4Group);
  const bool int4_experts =
      c.stored.int4_group < 0 || (c.stored.int4_group > 0 && c.stored.int4_group % kInt4Group == 0);
  const bool experts = kind == LayerKind::kExperts || kind == LayerKind::kShared;
  if (asks_for_int4(quantize, kind) || (int4_experts && experts && !asks_for_e4m3(quantize, kind)))
    return kInt4;
  const bool e4m3 = asks_for_e4m3(quantize, kind) || (stored && kind != LayerKind::kHead);
  return e4m3 ? kE4m3 : kDeviceWide;
}

double device_weight_bytes(const checkpoint::ModelConfig& c, ModelQuantize quantize, bool module) {
  const auto each = [&](LayerKind kind) { return device_bytes_each(c, quantize, kind); };
  const double model = sum_bytes(count_weights(c, c.num_hidden_layers), kDeviceWide, each);
  return module ? model + sum_bytes(count_module_weights(c), kDeviceWide, each) : model;
}

double page_bytes(const checkpoint::ModelConfig& c, bool fp8_cache, bool module) {
  const int width = c.kv_lora_rank + c.qk_rope_head_dim;
  const double row =
      static_cast<double>(kv::token_bytes(fp8_cache ? KvFormat::kFp8V32 : KvFormat::kBFloat16, width));
  double token = 0;
  for (int i = 0; i < c.num_hidden_layers + (module ? 1 : 0); ++i) {
    token += row;
    if (i == c.num_hidden_layers ? c.index_topk > 0 : c.has_indexer(i))
      token += c.index_head_dim + 4.0;  // a float32 scale
  }
  return kPageSize * token;
}

void check_fits_device(const checkpoint::ModelConfig& config, int cache_pages, double cache_bytes,
                       bool fp8_cache, const DeviceMemory& memory, ModelQuantize quantize, bool module) {
  const double page = page_bytes(config, fp8_cache, module);
  const double cache = cache_pages > 0 ? cache_pages * page : std::max(cache_bytes, page);
  const double weights = num_weights(config) + (module ? num_module_weights(config) : 0);
  const double bytes = device_weight_bytes(config, quantize, module);
  if (bytes + cache <= memory.free) return;
  throw OutOfMemory(fmt::format(
      "the model does not fit into the device's memory: {:.1f} billion weights {} are {:.1f} GiB, "
      "{} {:.1f} GiB (--num-pages, --memory), and of {:.1f} GiB there are {:.1f} GiB free",
      weights / 1e9, bytes == 2 * weights ? "in bfloat16" : fmt::format("of {:.3g} bytes", bytes / weights),
      bytes / kGiB,
      cache_pages > 0 || cache_bytes > 0 ? "the cache that is asked for" : "a cache of one page",
      cache / kGiB, memory.total / kGiB, memory.free / kGiB));
}

void check_fits(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, double memory,
                int dp) {
  const double weights = count_weights(config, config.num_hidden_layers).on_ranks(dp).all(),
               bytes = weight_bytes(config, dtype, quantize, dp);
  if (bytes <= memory) return;
  throw OutOfMemory(fmt::format(
      "the model does not fit into memory: {:.1f} billion weights of {:.3g} bytes are {:.1f} GiB, and "
      "there are {:.1f} GiB",
      weights / 1e9, bytes / weights, bytes / kGiB, memory / kGiB));
}

}  // namespace flash_mla::model
