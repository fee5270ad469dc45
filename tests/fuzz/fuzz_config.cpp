// Arbitrary bytes as a config.json. What is accepted must be a shape that the loader can count with; what is
// refused must leave a message that names the file.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "checkpoint/config.h"
#include "flash_mla/error.h"

namespace {

using namespace flash_mla::checkpoint;

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const ModelConfig& c) {
  require(c.vocab_size > 0 && c.hidden_size > 0 && c.intermediate_size > 0 && c.num_hidden_layers > 0);
  require(c.num_attention_heads > 0 && c.q_lora_rank >= 0 && c.kv_lora_rank > 0);
  require(c.qk_nope_head_dim > 0 && c.qk_rope_head_dim > 0 && c.qk_rope_head_dim % 2 == 0 &&
          c.v_head_dim > 0);
  require(c.max_position_embeddings > 0);
  require(std::isfinite(c.softmax_scale()) && c.softmax_scale() > 0);
  require(std::isfinite(c.rope_theta) && c.rope_theta > 0 && c.rope_scaling.factor >= 1);
  if (c.n_routed_experts > 0) {
    require(c.num_experts_per_tok > 0 && c.num_experts_per_tok <= c.n_routed_experts);
    require(c.n_group > 0 && c.n_routed_experts % c.n_group == 0 && c.topk_group <= c.n_group);
    require(c.moe_intermediate_size > 0);
  }
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) c.is_moe_layer(layer);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    check(parse_config({reinterpret_cast<const char*>(data), size}, "fuzz"));
  } catch (const flash_mla::InvalidArgument& e) {
    require(std::string_view(e.what()).starts_with("fuzz: "));
  } catch (const flash_mla::Unsupported& e) {
    require(std::string_view(e.what()).starts_with("fuzz: "));
  }
  return 0;
}
