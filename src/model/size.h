#pragma once

#include "checkpoint/config.h"
#include "flash_mla/model_options.h"
#include "flash_mla/tensor.h"

namespace flash_mla::model {

/// Weights of the products, the embedding and the LM head of a model: all but a thousandth of its parameters.
double num_weights(const checkpoint::ModelConfig& config);

/// Throws OutOfMemory, with the sizes, if the weights alone are larger than all of `memory` bytes.
void check_fits(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, double memory);

}  // namespace flash_mla::model
