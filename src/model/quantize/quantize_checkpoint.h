#pragma once

#include <filesystem>
#include <set>
#include <vector>

#include "flash_mla/quantize_checkpoint.h"
#include "model/quantize/calibration.h"
#include "model/quantized_layers.h"

namespace flash_mla::model {

/// The layers that options.layers names, or the format's own. Throws InvalidArgument.
std::set<LayerKind> layers_of(const QuantizeCheckpointOptions& options);

/// flash_mla::quantize_checkpoint with a calibration that may be empty.
QuantizeCheckpointReport write_quantized(const std::filesystem::path& model, const std::filesystem::path& out,
                                         const QuantizeCheckpointOptions& options,
                                         const Calibration& calibration);

}  // namespace flash_mla::model
