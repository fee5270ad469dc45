#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CpuMtpInput : public MtpInput {
 public:
  CpuMtpInput(CpuContext& context, const MtpWeights& weights);
  void keep(const Residual& x) override;
  void keep_own(const Residual& x) override;
  void forward(Residual& x) override;

 private:
  CpuContext& context_;
  std::vector<float> token_norm_, state_norm_, model_norm_, head_norm_;
  CpuLinear projection_;
  Buffer states_, own_states_;  ///< (tokens, hidden) of the last step; (logit rows, hidden) of the last draft
  Buffer joined_;
};

}  // namespace flash_mla::model
