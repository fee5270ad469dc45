#pragma once

#include <memory>

#include "model/model.h"
#include "model/ops.h"

namespace flash_mla::model {

/// What `kAuto` precision means here: bfloat16 where the processor multiplies it natively.
DType preferred_cpu_dtype();

/// The operations on the CPU: products by oneDNN or our own kernels, decode attention by
/// flash_mla::dense_decode. `dtype` is float32 or bfloat16. Throws Unsupported where the machine has no
/// kernels for it.
std::unique_ptr<Ops> make_cpu_ops(const ModelConfig& config, DType dtype, ModelQuantize quantize,
                                  int num_threads);

}  // namespace flash_mla::model
