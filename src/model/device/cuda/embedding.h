#pragma once

#include "base/buffer.h"
#include "model/device/cuda/context.h"
#include "model/layers.h"
#include "model/weights.h"

namespace flash_mla::model {

class CudaEmbedding : public Embedding {
 public:
  CudaEmbedding(CudaContext& context, const Weight& table)
      : context_(context), table_(context.weights.matrix(table)) {}

  /// And the cosines and sines of the step's positions.
  Residual forward() override;

 private:
  CudaContext& context_;
  Buffer table_;  ///< (vocab_size, hidden)
};

}  // namespace flash_mla::model
