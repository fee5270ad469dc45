#pragma once

#include "checkpoint/config.h"
#include "flash_mla/model_options.h"
#include "flash_mla/tensor.h"
#include "model/quantized_layers.h"

namespace flash_mla::model {

/// Weights of the products, the embedding and the LM head of a model: all but a thousandth of its parameters.
double num_weights(const checkpoint::ModelConfig& config);

/// Of those, how many are in the first `layers` layers, the embedding included.
double num_weights_before(const checkpoint::ModelConfig& config, int layers);

/// Of the module for multi-token prediction: its layer, a mixture, and its projection.
double num_module_weights(const checkpoint::ModelConfig& config);

/// Bytes of a page of the cache on a GPU, over all layers: latents in bfloat16, or with `fp8_cache` 656 bytes a token,
/// and index keys in e4m3. `module`: and of that of the module.
double page_bytes(const checkpoint::ModelConfig& config, bool fp8_cache, bool module = false);

/// Bytes of a device's own memory.
struct DeviceMemory {
  double free = 0, total = 0;
};

/// Bytes of those weights on a GPU, which keeps in e4m3 what is stored so (in blocks of multiples of 8 rows and 128
/// columns) or what `quantize` asks for, experts in 4 bits alike (groups of multiples of 128 columns), and all else in
/// bfloat16. `module`: with the module's.
double device_weight_bytes(const checkpoint::ModelConfig& config, ModelQuantize quantize,
                           bool module = false);

/// Throws OutOfMemory, with the sizes, unless those weights and a cache of `cache_pages` pages, or if they are
/// 0 of `cache_bytes` bytes, or if they are 0 of one page, fit into what is free. To be called before anything is
/// loaded.
void check_fits_device(const checkpoint::ModelConfig& config, int cache_pages, double cache_bytes,
                       bool fp8_cache, const DeviceMemory& memory,
                       ModelQuantize quantize = ModelQuantize::kNone, bool module = false);

/// Bytes of those weights on the CPU, in `dtype` where neither `quantize` nor the checkpoint keeps them in fewer bits.
/// (A checkpoint of 4 bits may keep less so than is counted here: every product but the LM head's.) Of `dp` ranks in one
/// memory that share the routed experts alone.
double weight_bytes(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, int dp = 1);

/// Of one weight in layers of a kind: on the CPU, and on a GPU. (The embedding and kv_b are always wide.)
double bytes_each(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, LayerKind kind);
double device_bytes_each(const checkpoint::ModelConfig& config, ModelQuantize quantize, LayerKind kind);

/// Throws OutOfMemory, with the sizes, if the weights alone are larger than all of `memory` bytes.
void check_fits(const checkpoint::ModelConfig& config, DType dtype, ModelQuantize quantize, double memory,
                int dp = 1);

}  // namespace flash_mla::model
