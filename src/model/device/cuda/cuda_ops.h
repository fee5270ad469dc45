#pragma once

#include <memory>
#include <string>

#include "model/ops.h"

namespace flash_mla::model {

/// The operations on a Hopper GPU (CUDA device 0): bfloat16 weights, activations and cache, sums in fp32.
/// Attention by the sm90 kernels where the model has their head dimensions and by plain kernels where not,
/// products of many rows by cuBLASLt. A step whose tokens all take the absorbed form is recorded as a CUDA
/// graph the first time it comes in its (padded) size, and replayed from then on. `time_steps`: events are
/// recorded around every step, for device_seconds().
///
/// Throws Unsupported where there is no such GPU, driver or library, or this build has no kernels for it.
std::unique_ptr<Ops> make_cuda_ops(const ModelConfig& config, bool time_steps);

/// Why make_cuda_ops would throw Unsupported, or "".
std::string why_no_cuda_ops();

}  // namespace flash_mla::model
