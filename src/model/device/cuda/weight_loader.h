#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/buffer.h"
#include "model/device/cuda/memory.h"
#include "model/device/cuda/weight_uploader.h"
#include "model/e4m3_weight.h"
#include "model/int4_weight.h"
#include "model/weights.h"

namespace flash_mla::model {

/// A matrix on the device: bfloat16, or e4m3 or int4 with the scales of kernels/gemm/sm90 where `scales` is not empty.
struct CudaMatrix {
  Buffer values, scales;
  bool whole_blocks = false, halves_of_blocks = false;  ///< as in_whole_blocks() and in_halves_of_blocks()
  bool int4 = false;
  bool e4m3() const { return scales.bytes() > 0 && !int4; }
};

/// Makes the weights of layers on the device: reads them, or makes up what is not to be read.
class WeightLoader {
 public:
  WeightLoader(DevicePool& pool, cudaStream_t stream, ModelQuantize quantize)
      : pool_(pool), stream_(stream), quantize_(quantize) {}

  /// Whether bfloat16 weights of layers of this kind are to be quantised, to e4m3 or to 4 bits.
  bool quantises(LayerKind kind) const { return asks_for_e4m3(quantize_, kind); }
  bool quantises_int4(LayerKind kind) const { return asks_for_int4(quantize_, kind); }
  /// A weight of a layer of this kind: e4m3 as it is stored, or as the model's options ask for, else bfloat16. Throws
  /// Unsupported where e4m3 is asked for and the sizes do not allow it.
  CudaMatrix matrix(const Weight& weight, LayerKind kind);
  /// `matrices` of that many rows and columns each, made up.
  CudaMatrix made_up_e4m3(std::int64_t matrices, std::int64_t rows, std::int64_t columns);
  CudaMatrix made_up_int4(std::int64_t matrices, std::int64_t rows, std::int64_t columns);

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
  CudaMatrix upload(const E4m3Weight& weight);

  DevicePool& pool_;
  cudaStream_t stream_;
  ModelQuantize quantize_;
  std::unique_ptr<WeightUploader> uploader_;
  std::uint64_t seed_ = 1;  // of the next weight that is made up
};

/// Throws Unsupported, naming the weight, unless takes_e4m3() takes one that is to be quantised.
void check_takes_e4m3(const Weight& weight);

/// A weight's bits of bfloat16 on the host; null where it is to be made up.
std::unique_ptr<std::uint16_t[]> read_bfloat16(const Weight& weight);

}  // namespace flash_mla::model
