#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/buffer.h"
#include "model/device/cuda/memory.h"
#include "model/device/cuda/weight_uploader.h"
#include "model/weights.h"

namespace flash_mla::model {

/// Makes the weights of layers on the device: reads them, or makes up what is not to be read.
class WeightLoader {
 public:
  WeightLoader(DevicePool& pool, cudaStream_t stream) : pool_(pool), stream_(stream) {}

  /// Norms and biases, float32; empty for none.
  Buffer vector(std::span<const float> values);
  /// In bfloat16.
  Buffer matrix(const Weight& weight);
  /// `count` bfloat16 values of the host, or made up for null.
  Buffer matrix(const std::uint16_t* values, std::int64_t count);
  /// In float32.
  Buffer float32_matrix(const Weight& weight);

  WeightUploader& uploader();
  /// Gives the page-locked memory back, until more is uploaded.
  void finish() { uploader_.reset(); }

 private:
  DevicePool& pool_;
  cudaStream_t stream_;
  std::unique_ptr<WeightUploader> uploader_;
  std::uint64_t seed_ = 1;  // of the next weight that is made up
};

/// A weight's bits of bfloat16 on the host; null where it is to be made up.
std::unique_ptr<std::uint16_t[]> read_bfloat16(const Weight& weight);

}  // namespace flash_mla::model
