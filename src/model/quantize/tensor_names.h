#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "model/quantized_layers.h"

namespace flash_mla::model {

/// Whose product the weights in a checkpoint's tensor belong to; nothing for those that are never quantised.
std::optional<LayerKind> kind_of(std::string_view tensor);

/// "attention", "dense", "shared", "experts" or "head", and back; `name` as a field of errors would have it.
const char* name_of(LayerKind kind);
LayerKind kind_named(std::string_view name);

/// Up to and with its layer: "model.layers.3" of "model.layers.3.mlp.gate.weight"; "" outside the layers.
std::string_view layer_of(std::string_view tensor);

/// Without its last part: "lm_head" of "lm_head.weight".
std::string_view module_of(std::string_view tensor);

}  // namespace flash_mla::model
