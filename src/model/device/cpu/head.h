#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/matrix.h"
#include "kernels/sampling/token_rule.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CpuHead : public Head {
 public:
  CpuHead(CpuContext& context, const HeadWeights& weights);
  /// With the weight of `other`.
  CpuHead(const CpuHead& other, std::vector<float> norm);
  Matrix forward(const Residual& x) override;

 private:
  CpuContext& context_;
  std::vector<float> norm_;
  std::shared_ptr<const CpuLinear> weight_;  ///< (vocab_size, hidden)
};

/// tokens[i] (int32) of logit row i from the step's first_chosen on: the likeliest or the drawn one.
/// `rules`: of each of them, or none; they change the logits.
void choose_tokens(const CpuContext& context, const Matrix& logits, std::int32_t* tokens,
                   std::span<const TokenRule> rules = {});

}  // namespace flash_mla::model
