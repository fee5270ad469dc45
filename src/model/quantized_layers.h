#pragma once

#include <cstdint>
#include <optional>

#include "base/quantized.h"
#include "flash_mla/model_options.h"

namespace flash_mla::model {

/// What a product of a model belongs to. Never quantised are the embedding (it is looked up), norms, the router and
/// an indexer's head weights (they decide, in float32).
enum class LayerKind {
  kAttention,  ///< its projections, the indexer's included
  kDense,      ///< feed-forward of the first layers
  kShared,     ///< experts that every token takes
  kExperts,    ///< routed experts
  kHead,       ///< LM head
};

/// The form that `quantize` gives the weights of such a layer when a model is loaded; nothing for as they are.
inline std::optional<QuantizedFormat> quantized_format(ModelQuantize quantize, LayerKind kind) {
  const bool experts = kind == LayerKind::kExperts || kind == LayerKind::kShared;
  if (quantize == ModelQuantize::kFp8 && (experts || kind == LayerKind::kAttention)) {
    return QuantizedFormat{QuantizedType::kE4m3, kFp8Block};
  }
  if (quantize == ModelQuantize::kW4A8 && experts) return QuantizedFormat{QuantizedType::kInt4, kInt4Group};
  return std::nullopt;
}

}  // namespace flash_mla::model
