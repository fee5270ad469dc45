#include "model/device/cuda/embedding.h"

#include "kernels/rows/sm90/rows.h"

namespace flash_mla::model {

Residual CudaEmbedding::forward() {
  const StepData& data = context_.data;
  const Matrix x =
      context_.activations(context_.buffers.x, context_.step->num_tokens(), context_.config.hidden_size);
  sm90::embed(table_.data(), data.token_ids,
              reinterpret_cast<const std::int32_t*>(context_.buffers.tokens.data()), data.positions,
              context_.rotations, x, context_.stream);
  return {x};
}

}  // namespace flash_mla::model
