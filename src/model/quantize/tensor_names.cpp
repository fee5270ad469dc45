#include "model/quantize/tensor_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "flash_mla/error.h"

namespace flash_mla::model {
namespace {

struct KindName {
  LayerKind kind;
  const char* name;
};
constexpr std::array<KindName, 5> kKinds = {{{LayerKind::kAttention, "attention"},
                                             {LayerKind::kDense, "dense"},
                                             {LayerKind::kShared, "shared"},
                                             {LayerKind::kExperts, "experts"},
                                             {LayerKind::kHead, "head"}}};

bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

template <std::size_t N>
bool one_of(std::string_view name, const std::string_view (&names)[N]) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

constexpr std::string_view kAttention[] = {"q_proj",    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
                                           "kv_b_proj", "o_proj"};
constexpr std::string_view kIndexer[] = {"wq_b", "wk"};
constexpr std::string_view kFeedForward[] = {"gate_proj", "up_proj", "down_proj"};

}  // namespace

std::string_view module_of(std::string_view tensor) { return tensor.substr(0, tensor.rfind('.')); }

std::string_view layer_of(std::string_view tensor) {
  constexpr std::string_view kLayers = "model.layers.";
  if (!tensor.starts_with(kLayers)) return "";
  return tensor.substr(0, tensor.find('.', kLayers.size()));
}

std::optional<LayerKind> kind_of(std::string_view tensor) {
  if (!tensor.ends_with(".weight")) return std::nullopt;
  const std::string_view module = module_of(tensor), leaf = module.substr(module.rfind('.') + 1);
  if (module == "lm_head") return LayerKind::kHead;
  if (layer_of(tensor).empty()) return std::nullopt;
  if (contains(module, ".self_attn.indexer.")) {
    return one_of(leaf, kIndexer) ? std::optional(LayerKind::kAttention) : std::nullopt;
  }
  if (contains(module, ".self_attn.")) {
    return one_of(leaf, kAttention) ? std::optional(LayerKind::kAttention) : std::nullopt;
  }
  if (!one_of(leaf, kFeedForward) || !contains(module, ".mlp.")) return std::nullopt;
  if (contains(module, ".mlp.experts.")) return LayerKind::kExperts;
  return contains(module, ".mlp.shared_experts.") ? LayerKind::kShared : LayerKind::kDense;
}

const char* name_of(LayerKind kind) {
  for (const KindName& k : kKinds) {
    if (k.kind == kind) return k.name;
  }
  return "";
}

LayerKind kind_named(std::string_view name) {
  for (const KindName& k : kKinds) {
    if (k.name == name) return k.kind;
  }
  throw InvalidArgument(
      fmt::format("layers: \"{}\": expected attention, dense, shared, experts or head", name));
}

}  // namespace flash_mla::model
