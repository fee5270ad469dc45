#pragma once

#include <memory>
#include <span>

#include "base/buffer.h"
#include "base/matrix.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CudaHead : public Head {
 public:
  CudaHead(CudaContext& context, const HeadWeights& weights);
  /// With the weight of `other`.
  CudaHead(const CudaHead& other, std::span<const float> norm);
  Matrix forward(const Residual& x) override;

 private:
  CudaContext& context_;
  Buffer norm_;
  std::shared_ptr<const CudaLinear> weight_;  ///< (vocab_size, hidden)
};

/// Device::choose, into the context's tokens.
void choose_tokens(CudaContext& context, const Matrix& logits);

}  // namespace flash_mla::model
