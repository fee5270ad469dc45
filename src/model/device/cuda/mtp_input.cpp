#include "model/device/cuda/mtp_input.h"

#include "kernels/rows/sm90/rows.h"

namespace flash_mla::model {

CudaMtpInput::CudaMtpInput(CudaContext& context, const MtpWeights& weights)
    : context_(context),
      token_norm_(context.weights.vector(weights.token_norm)),
      state_norm_(context.weights.vector(weights.state_norm)),
      model_norm_(context.weights.vector(weights.model_norm)),
      head_norm_(context.weights.vector(weights.head_norm)),
      projection_(context, weights.projection, {}, LayerKind::kDense) {
  context.keeps_states = true;
}

void CudaMtpInput::keep(const Residual& x) {
  context_.finish_layers(x.x);
  const Matrix states = context_.activations(context_.buffers.states, x.x.rows, x.x.columns);
  context_.rms_norm(x.x, model_norm_, context_.config.rms_norm_eps, states);
}

void CudaMtpInput::keep_own(const Residual& x) {
  context_.finish_layers(x.x);
  const auto rows = static_cast<std::int64_t>(context_.step->logit_rows.size());
  if (rows == 0) return;
  const Matrix states = context_.activations(context_.buffers.own_states, rows, x.x.columns);
  sm90::gather(x.x, context_.data.logit_rows, states, context_.stream);
  context_.rms_norm(states, head_norm_, context_.config.rms_norm_eps, states);
}

void CudaMtpInput::forward(Residual& x) {
  const std::int64_t hidden = x.x.columns, count = x.x.rows;
  const double eps = context_.config.rms_norm_eps;
  const Buffer& from =
      context_.step->reads == ModuleStates::kModels ? context_.buffers.states : context_.buffers.own_states;
  const Matrix kept{from.data(), x.x.dtype, count, hidden, hidden};
  const Matrix joined = context_.activations(context_.buffers.joined, count, 2 * hidden);
  const Matrix states = joined.column_range(hidden, hidden);
  context_.rms_norm(x.x, token_norm_, eps, joined.column_range(0, hidden));
  sm90::gather(kept, context_.data.states, states, context_.stream);
  context_.rms_norm(states, state_norm_, eps, states);
  projection_.multiply(context_, joined, x.x);
}

}  // namespace flash_mla::model
