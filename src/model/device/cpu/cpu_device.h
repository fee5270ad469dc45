#pragma once

#include <memory>

#include "model/device.h"
#include "model/model.h"

namespace flash_mla::model {

/// What `kAuto` precision means here: bfloat16 where the processor multiplies it natively.
DType preferred_cpu_dtype();

/// The CPU: products by oneDNN or our own kernels, decode attention by flash_mla::dense_decode. `dtype`, of
/// weights, activations and cache, is float32 or bfloat16; `num_threads` 0: as many as OpenMP would use.
/// Throws Unsupported where the machine has no kernels for it.
std::unique_ptr<Device> make_cpu_device(const ModelConfig& config, DType dtype, ModelQuantize quantize,
                                        int num_threads);

}  // namespace flash_mla::model
