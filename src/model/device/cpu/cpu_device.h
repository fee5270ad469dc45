#pragma once

#include <memory>
#include <optional>

#include "flash_mla/kv_cache.h"
#include "model/device.h"
#include "model/model.h"
#include "model/parallel/partition.h"

namespace flash_mla::model {

/// What `kAuto` precision means here: bfloat16 where the processor multiplies it natively.
DType preferred_cpu_dtype();

/// The format of the cache of a model in `dtype`; empty: rows of that type. Throws Unsupported for one that the
/// configuration or the type does not have.
std::optional<KvFormat> cpu_cache_format(const ModelConfig& config, DType dtype, ModelKvCache kv_cache);

/// The CPU: products by oneDNN or our own kernels, decode attention by flash_mla::dense_decode. `dtype`, of
/// weights, activations and a cache without a format of its own, is float32 or bfloat16. Of a rank among several:
/// `config` with its heads, its partition and its links. Throws Unsupported where the machine has no kernels for the type.
std::unique_ptr<Device> make_cpu_device(const ModelConfig& config, DType dtype,
                                        std::optional<KvFormat> cache_format, const ModelOptions& options,
                                        const Partition& partition = {}, const RankLinks& links = {});

}  // namespace flash_mla::model
