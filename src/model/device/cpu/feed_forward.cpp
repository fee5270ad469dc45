#include "model/device/cpu/feed_forward.h"

#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {

CpuGatedNetwork::CpuGatedNetwork(const CpuContext& context, const Weight& gate_up, const Weight& down,
                                 std::int64_t intermediate, LayerKind kind)
    : intermediate_(gate_up.rows / 2),
      gate_up_(context, gate_up, kind),
      down_(context, down, kind, shares(context.partition, intermediate)) {}

Matrix CpuGatedNetwork::activate(CpuContext& context, const Matrix& h) const {
  const Matrix gate_up = context.activations(context.buffers.gate_up, h.rows, 2 * intermediate_);
  const Matrix act = context.activations(context.buffers.act, h.rows, intermediate_);
  gate_up_.multiply(context, h, gate_up);
  context.for_rows(h.rows, intermediate_, [&](std::int64_t t) {
    const std::byte* gate = gate_up.row(t);
    cpu::rows::silu_mul(gate, gate + intermediate_ * context.element(), act.row(t), context.dtype,
                        intermediate_);
  });
  return act;
}

void CpuGatedNetwork::add(CpuContext& context, const Matrix& h, const Matrix& x) const {
  down_.multiply_add(context, activate(context, h), x);
}

void CpuGatedNetwork::multiply(CpuContext& context, const Matrix& h, const Matrix& sum) const {
  down_.multiply(context, activate(context, h), sum);
}

CpuFeedForward::CpuFeedForward(CpuContext& context, const FeedForwardWeights& weights)
    : context_(context),
      norm_(weights.norm),
      network_(context, weights.gate_up, weights.down, context.config.intermediate_size, LayerKind::kDense) {}

void CpuFeedForward::forward(Residual& x) {
  if (x.x.rows == 0) return;
  const Matrix h = context_.activations(context_.buffers.h, x.x.rows, x.x.columns);
  context_.rms_norm(x.x, norm_, context_.config.rms_norm_eps, h);
  network_.add(context_, h, x.x);
}

}  // namespace flash_mla::model
