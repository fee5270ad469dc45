#pragma once

#include <vector>

#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

/// Two products with a gate between: down · (silu(gate · h) * (up · h)).
class CpuGatedNetwork {
 public:
  CpuGatedNetwork(const CpuContext& context, const Weight& gate_up, const Weight& down, LayerKind kind);
  /// x += network(h)
  void add(CpuContext& context, const Matrix& h, const Matrix& x) const;

 private:
  std::int64_t intermediate_;
  CpuLinear gate_up_;  ///< (2 * intermediate, hidden)
  CpuLinear down_;     ///< (hidden, intermediate)
};

class CpuFeedForward : public FeedForward {
 public:
  CpuFeedForward(CpuContext& context, const FeedForwardWeights& weights);
  void forward(Residual& x) override;

 private:
  CpuContext& context_;
  std::vector<float> norm_;
  CpuGatedNetwork network_;
};

}  // namespace flash_mla::model
