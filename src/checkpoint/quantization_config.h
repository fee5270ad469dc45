#pragma once

#include "base/json.h"
#include "checkpoint/stored_format.h"

namespace flash_mla::checkpoint {

/// What the quantization_config of a config.json says: DeepSeek's block-scaled FP8, or weights of 4 bits as
/// compressed-tensors packs them; or nothing. How activations are to be quantised is read and not obeyed: they keep
/// the engine's precision. Throws InvalidArgument or Unsupported, naming field, value and what was expected, also for
/// a field that is not known.
StoredFormat read_stored_format(const JsonObject& config);

}  // namespace flash_mla::checkpoint
