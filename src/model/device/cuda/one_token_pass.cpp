#include "model/device/cuda/one_token_pass.h"

#include <stdexcept>

#include "base/cuda/check.h"
#include "model/device/cuda/one_token_config.h"

namespace flash_mla::model {

OneTokenPass::OneTokenPass(const ModelConfig& config, DevicePool& pool, cudaStream_t stream) {
  if (!fits_one_token(config)) return;
  args_ = std::make_unique<sm90::OneToken>(one_token_of(config));
  model_layers_ = config.num_hidden_layers;
  module_fits_ = module_fits_one_token(config);
  args_->softmax_scale = static_cast<float>(config.softmax_scale());
  workspace_ = pool.allocate(sm90::one_token_workspace_size());
  check(cudaMemsetAsync(workspace_.data(), 0, sm90::one_token_workspace_size(), stream), "cudaMemsetAsync");
}

void OneTokenPass::begin(bool model) {
  num_layers_ = 0;
  pending_ = true;
  if (args_) args_->num_layers = model ? model_layers_ : 1;
}

sm90::OneTokenLayer& OneTokenPass::add_layer() {
  if (num_layers_ == args_->num_layers) throw std::logic_error("one_token: more layers than the model has");
  return args_->layers[num_layers_++] = {};
}

void OneTokenPass::run(const StepData& data, const sm90::RotationTable& rotations, const Matrix& x,
                       cudaStream_t stream) {
  if (num_layers_ != args_->num_layers) throw std::logic_error("one_token: fewer layers than the model has");
  args_->num_tokens = static_cast<int>(x.rows);
  args_->cosines = rotations.cosines;
  args_->sines = rotations.sines;
  args_->slot = data.slots;
  args_->len = data.lens;
  args_->table = data.table;
  args_->x = x.data;
  args_->workspace = workspace_.data();
  check(sm90::one_token(*args_, stream), "one_token");
  pending_ = false;
}

}  // namespace flash_mla::model
