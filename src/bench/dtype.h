#pragma once

// Names of element types on the command line, in presets and in results.

#include <optional>
#include <string>

#include "flash_mla/tensor.h"

namespace flash_mla::bench {

/// What find_dtype takes, for messages.
inline constexpr const char* kDtypeNames = "bf16, fp16 or fp32";

/// "bf16" or "bfloat16", "fp16" or "float16", "fp32" or "float32"; nothing for another text.
std::optional<DType> find_dtype(const std::string& text);

/// The same; throws InvalidArgument for another text.
DType parse_dtype(const std::string& text);

/// "bf16", "fp16", "fp32".
const char* short_dtype(DType dtype);

}  // namespace flash_mla::bench
