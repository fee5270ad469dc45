#include "model/size.h"

#include <fmt/format.h>

#include "flash_mla/error.h"

namespace flash_mla::model {

double num_weights(const checkpoint::ModelConfig& c) {
  const double hidden = c.hidden_size, heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const double nope = c.qk_nope_head_dim, rope = c.qk_rope_head_dim, v = c.v_head_dim;
  const double q =
      c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + heads * (nope + rope)) : hidden * heads * (nope + rope);
  const double attention = q + (rank + rope) * hidden + heads * rank * (nope + v) + heads * v * hidden;
  double total = hidden * c.vocab_size * (c.tie_word_embeddings ? 1 : 2);
  for (int i = 0; i < c.num_hidden_layers; ++i) {
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

void check_fits(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, double memory) {
  const double each = quantize == ModelQuantize::kInt8 ? 1 : static_cast<double>(dtype_size(dtype));
  const double weights = num_weights(config), bytes = weights * each;
  if (bytes <= memory) return;
  constexpr double kGiB = 1 << 30;
  throw OutOfMemory(fmt::format(
      "the model does not fit into memory: {:.1f} billion weights of {} bytes are {:.1f} GiB, and "
      "there are {:.1f} GiB",
      weights / 1e9, each, bytes / kGiB, memory / kGiB));
}

}  // namespace flash_mla::model
