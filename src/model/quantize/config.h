#pragma once

#include <set>
#include <string>
#include <vector>

#include "base/json.h"
#include "flash_mla/quantize_checkpoint.h"

namespace flash_mla::model {

/// The quantization_config of config.json for a checkpoint whose products `kept` (names of modules) are not quantised;
/// `group`: columns of a scale of 4 bits.
Json quantization_config(const QuantizeCheckpointOptions& options, std::int64_t group,
                         const std::vector<std::string>& kept);

}  // namespace flash_mla::model
