#pragma once

#include <vector>

#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/device/cpu/reduced_linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

/// Two products with a gate between: down · (silu(gate · h) * (up · h)); ranks have a share of the width between each.
class CpuGatedNetwork {
 public:
  /// `intermediate`: the whole width.
  CpuGatedNetwork(const CpuContext& context, const Weight& gate_up, const Weight& down,
                  std::int64_t intermediate, LayerKind kind);
  /// x += network(h), on all ranks.
  void add(CpuContext& context, const Matrix& h, const Matrix& x) const;
  /// sum (float32) = what this rank adds to it. Not of an exact partition.
  void multiply(CpuContext& context, const Matrix& h, const Matrix& sum) const;

 private:
  Matrix activate(CpuContext& context, const Matrix& h) const;

  std::int64_t intermediate_;  ///< this rank's
  CpuLinear gate_up_;          ///< (2 * intermediate, hidden)
  CpuReducedLinear down_;      ///< (hidden, intermediate)
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
