#include "model/size.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/page_size.h"
#include "flash_mla/error.h"

namespace flash_mla::model {

namespace {

constexpr double kGiB = 1 << 30;

}  // namespace

double num_weights(const checkpoint::ModelConfig& c) {
  const double head = c.tie_word_embeddings ? 0 : double{1} * c.hidden_size * c.vocab_size;
  return num_weights_before(c, c.num_hidden_layers) + head;
}

double num_weights_before(const checkpoint::ModelConfig& c, int layers) {
  const double hidden = c.hidden_size, heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const double nope = c.qk_nope_head_dim, rope = c.qk_rope_head_dim, v = c.v_head_dim;
  const double q =
      c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + heads * (nope + rope)) : hidden * heads * (nope + rope);
  const double attention = q + (rank + rope) * hidden + heads * rank * (nope + v) + heads * v * hidden;
  double total = hidden * c.vocab_size;
  for (int i = 0; i < layers; ++i) {
    const double width = c.is_moe_layer(i)
                             ? double{1} * c.moe_intermediate_size * (c.n_routed_experts + c.n_shared_experts)
                             : c.intermediate_size;
    total += attention + 3 * hidden * width;
    if (c.has_indexer(i)) {
      total += double{1} * c.index_n_heads * (c.index_head_dim * double{1} * c.q_lora_rank + hidden) +
               c.index_head_dim * hidden;
    }
  }
  return total;
}

double page_bytes(const checkpoint::ModelConfig& c, DType dtype) {
  return double{kPageSize} * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) *
         static_cast<double>(dtype_size(dtype));
}

void check_fits_device(const checkpoint::ModelConfig& config, int cache_pages, double cache_bytes,
                       const DeviceMemory& memory) {
  const double page = page_bytes(config, DType::kBFloat16);
  const double cache = cache_pages > 0 ? cache_pages * page : std::max(cache_bytes, page);
  const double weights = num_weights(config), bytes = 2 * weights;
  if (bytes + cache <= memory.free) return;
  throw OutOfMemory(fmt::format(
      "the model does not fit into the device's memory: {:.1f} billion weights in bfloat16 are {:.1f} GiB, "
      "{} {:.1f} GiB (--num-pages, --memory), and of {:.1f} GiB there are {:.1f} GiB free",
      weights / 1e9, bytes / kGiB,
      cache_pages > 0 || cache_bytes > 0 ? "the cache that is asked for" : "a cache of one page",
      cache / kGiB, memory.total / kGiB, memory.free / kGiB));
}

void check_fits(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, double memory) {
  const double each = quantize == ModelQuantize::kInt8 ? 1 : static_cast<double>(dtype_size(dtype));
  const double weights = num_weights(config), bytes = weights * each;
  if (bytes <= memory) return;
  throw OutOfMemory(fmt::format(
      "the model does not fit into memory: {:.1f} billion weights of {} bytes are {:.1f} GiB, and "
      "there are {:.1f} GiB",
      weights / 1e9, each, bytes / kGiB, memory / kGiB));
}

}  // namespace flash_mla::model
