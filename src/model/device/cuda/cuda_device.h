#pragma once

#include <memory>
#include <string>

#include "model/device.h"
#include "model/parallel/partition.h"
#include "model/size.h"

namespace flash_mla::model {

/// Which GPU, and which rank.
struct CudaSeat {
  Partition partition;
  RankLinks links;
  int device = 0;   ///< its CUDA index
  int sharing = 1;  ///< ranks on it
};

/// A Hopper GPU: bfloat16 activations and cache, weights in bfloat16 or, where they are stored so or
/// `quantize` is kFp8, in e4m3 (e4m3_weight.h); sums in fp32. Attention by the sm90
/// kernels where the model has their head dimensions and by plain kernels where not, products of many rows by
/// cuBLASLt. A step whose tokens all take the absorbed form is recorded as a CUDA graph the first time it
/// comes in its (padded) size, and replayed from then on. `time_steps`: events are recorded around every
/// step, for device_seconds().
///
/// With `fp8_cache` latents are KvFormat::kFp8V32, 656 bytes a token, which models with an indexer can have; their index
/// keys are e4m3 in any case.
///
/// Of a rank among several: `config` with its heads, and its seat; all are made together, each by a thread that stays the one
/// that queues its steps, of which the GPU becomes the current one. Sums are over the ranks' bfloat16 parts, in their order.
///
/// Throws Unsupported where there is no such GPU, driver or library, or this build has no kernels for it.
std::unique_ptr<Device> make_cuda_device(const ModelConfig& config, ModelQuantize quantize, bool time_steps,
                                         bool fp8_cache, const CudaSeat& seat = {});

/// Why sizes of the model's indexer, or of the latents beside it, have no kernels, with the field's name; or "".
std::string why_no_cuda_indexer(const ModelConfig& config);

/// Of a GPU. Throws where make_cuda_device would.
DeviceMemory cuda_memory(int device = 0);

/// Why make_cuda_device would throw Unsupported, or "".
std::string why_no_cuda_device(int device = 0);

/// GPUs that CUDA numbers, of any kind.
int num_cuda_devices();

}  // namespace flash_mla::model
