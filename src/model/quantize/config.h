#pragma once

#include <set>
#include <string>
#include <vector>

#include "base/json.h"
#include "flash_mla/quantize_checkpoint.h"

namespace flash_mla::model {

/// The quantization_config of config.json for a checkpoint whose products `kept` (names of modules) are not quantised.
Json quantization_config(const QuantizeCheckpointOptions& options, const std::vector<std::string>& kept);

}  // namespace flash_mla::model
