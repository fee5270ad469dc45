#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "flash_mla/top_k.h"
#include "model/device/cuda/cuda_device.h"

namespace flash_mla::model {

// Here and not beside the device, so that a build without CUDA has it as well.
std::string why_no_cuda_indexer(const ModelConfig& config) {
  if (config.index_topk == 0) return "";
  for (const auto& [name, value, expected] : {std::tuple("kv_lora_rank", config.kv_lora_rank, 512),
                                              std::tuple("qk_rope_head_dim", config.qk_rope_head_dim, 64)}) {
    if (value == expected) continue;
    return fmt::format("{} is {}, expected {} for sparse attention on device cuda; use device cpu", name,
                       value, expected);
  }
  if (config.index_head_dim != 64 && config.index_head_dim != 128) {
    return fmt::format("index_head_dim is {}, expected 64 or 128 on device cuda; use device cpu",
                       config.index_head_dim);
  }
  if (config.index_topk > kMaxTopK) {
    return fmt::format("index_topk is {}, expected at most {} on device cuda; use device cpu",
                       config.index_topk, kMaxTopK);
  }
  return "";
}

}  // namespace flash_mla::model
