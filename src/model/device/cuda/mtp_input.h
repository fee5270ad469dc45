#pragma once

#include "base/buffer.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/linear.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CudaMtpInput : public MtpInput {
 public:
  CudaMtpInput(CudaContext& context, const MtpWeights& weights);
  void keep(const Residual& x) override;
  void keep_own(const Residual& x) override;
  void forward(Residual& x) override;

 private:
  CudaContext& context_;
  Buffer token_norm_, state_norm_, model_norm_, head_norm_;
  CudaLinear projection_;
};

}  // namespace flash_mla::model
