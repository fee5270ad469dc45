#pragma once

#include "base/buffer.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

/// Of a dense layer: down · (silu(gate · h) * (up · h)).
class CudaFeedForward : public FeedForward {
 public:
  CudaFeedForward(CudaContext& context, const FeedForwardWeights& weights);
  void forward(Residual& x) override;

 private:
  CudaContext& context_;
  Buffer norm_;
  CudaLinear gate_up_;  ///< (2 * intermediate, hidden)
  CudaLinear down_;     ///< (hidden, intermediate)
  std::int64_t intermediate_;
};

}  // namespace flash_mla::model
