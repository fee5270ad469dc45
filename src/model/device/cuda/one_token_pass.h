#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "base/buffer.h"
#include "base/matrix.h"
#include "checkpoint/config.h"
#include "kernels/fused/sm90/one_token.h"
#include "kernels/rows/sm90/rows.h"
#include "model/device/cuda/memory.h"
#include "model/device/cuda/step_data.h"

namespace flash_mla::model {

/// A step of one token, or a few of one sequence, all layers of which one kernel does, on models that fit it: layers list
/// themselves as their turn comes, and the kernel is queued when the last of them is through. A step of the module for
/// multi-token prediction has one layer.
class OneTokenPass {
 public:
  /// For no model.
  OneTokenPass() = default;
  OneTokenPass(const ModelConfig& config, DevicePool& pool, cudaStream_t stream);

  /// Whether the model, or its module, is one of those.
  bool fits(bool model) const { return workspace_.bytes() > 0 && (model || module_fits_); }
  /// Forgets the layers. Those of the model will follow, or that of its module.
  void begin(bool model);
  /// A new layer, to be filled by attention, and then by its feed-forward network.
  sm90::OneTokenLayer& add_layer();
  sm90::OneTokenLayer& layer() { return args_->layers[num_layers_ - 1]; }
  /// Whether run() has not been called since begin().
  bool pending() const { return pending_; }
  /// Queues all layers over x (tokens, hidden).
  void run(const StepData& data, const sm90::RotationTable& rotations, const Matrix& x, cudaStream_t stream);

 private:
  std::unique_ptr<sm90::OneToken> args_;  // null where the model does not fit
  Buffer workspace_;
  int model_layers_ = 0, num_layers_ = 0;
  bool module_fits_ = false;
  bool pending_ = false;
};

}  // namespace flash_mla::model
