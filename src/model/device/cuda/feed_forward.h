#pragma once

#include "base/buffer.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

/// down · (silu(gate · h) * (up · h)); of ranks, a share of the width between.
class CudaGatedNetwork {
 public:
  CudaGatedNetwork(CudaContext& context, const Weight& gate_up, const Weight& down, LayerKind kind);

  /// out = network(h), or `accumulate`d to it.
  void run(CudaContext& context, const Matrix& h, const Matrix& out, bool accumulate) const;

  const CudaLinear& gate_up() const { return gate_up_; }
  const CudaLinear& down() const { return down_; }

 private:
  CudaLinear gate_up_;  ///< (2 * intermediate, hidden)
  CudaLinear down_;     ///< (hidden, intermediate)
  std::int64_t intermediate_;
};

/// Of a dense layer.
class CudaFeedForward : public FeedForward {
 public:
  CudaFeedForward(CudaContext& context, const FeedForwardWeights& weights);
  void forward(Residual& x) override;

 private:
  CudaContext& context_;
  Buffer norm_;
  CudaGatedNetwork network_;
};

}  // namespace flash_mla::model
