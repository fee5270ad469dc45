#include "model/device/cpu/mtp_input.h"

#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {

CpuMtpInput::CpuMtpInput(CpuContext& context, const MtpWeights& weights)
    : context_(context),
      token_norm_(weights.token_norm),
      state_norm_(weights.state_norm),
      model_norm_(weights.model_norm),
      head_norm_(weights.head_norm),
      projection_(context, weights.projection, LayerKind::kDense) {}

void CpuMtpInput::keep(const Residual& x) {
  const Matrix states = context_.activations(states_, x.x.rows, x.x.columns);
  context_.rms_norm(x.x, model_norm_, context_.config.rms_norm_eps, states);
}

void CpuMtpInput::keep_own(const Residual& x) {
  const auto rows = static_cast<std::int64_t>(context_.step->logit_rows.size());
  const Matrix states = context_.activations(own_states_, rows, context_.config.hidden_size);
  context_.gather_logit_rows(x.x, states);
  context_.rms_norm(states, head_norm_, context_.config.rms_norm_eps, states);
}

void CpuMtpInput::forward(Residual& x) {
  const std::int64_t hidden = x.x.columns, count = x.x.rows;
  if (count == 0) return;
  const Matrix joined = context_.activations(joined_, count, 2 * hidden);
  const Buffer& from = context_.step->reads == ModuleStates::kModels ? states_ : own_states_;
  const Matrix kept{from.data(), context_.dtype,
                    static_cast<std::int64_t>(from.bytes()) / (hidden * context_.element()), hidden, hidden};
  const auto eps = static_cast<float>(context_.config.rms_norm_eps);
  context_.for_rows(count, 2 * hidden, [&](std::int64_t t) {
    std::byte* out = joined.row(t);
    cpu::rows::rms_norm(x.x.row(t), token_norm_.data(), eps, out, context_.dtype, hidden);
    cpu::rows::rms_norm(kept.row(context_.step->states[static_cast<std::size_t>(t)]), state_norm_.data(), eps,
                        out + hidden * context_.element(), context_.dtype, hidden);
  });
  projection_.multiply(context_, joined, x.x);
}

}  // namespace flash_mla::model
