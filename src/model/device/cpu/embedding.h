#pragma once

#include "base/buffer.h"
#include "model/device/cpu/context.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CpuEmbedding : public Embedding {
 public:
  CpuEmbedding(CpuContext& context, const Weight& table);
  Residual forward() override;

 private:
  CpuContext& context_;
  Buffer table_;  ///< (vocab_size, hidden)
};

}  // namespace flash_mla::model
