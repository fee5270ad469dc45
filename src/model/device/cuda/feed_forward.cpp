#include "model/device/cuda/feed_forward.h"

namespace flash_mla::model {

CudaGatedNetwork::CudaGatedNetwork(CudaContext& context, const Weight& gate_up, const Weight& down,
                                   LayerKind kind)
    : gate_up_(context, gate_up, {}, kind), down_(context, down, {}, kind), intermediate_(down.columns) {}

void CudaGatedNetwork::run(CudaContext& context, const Matrix& h, const Matrix& out, bool accumulate) const {
  const Matrix act = context.activations(context.buffers.act, h.rows, intermediate_);
  if (gate_up_.multiply_feed_forward(context, h, down_, out, accumulate)) return;
  gate_up_.multiply_silu_mul(context, h, act);
  down_.run(context, act, out, accumulate);
}

CudaFeedForward::CudaFeedForward(CudaContext& context, const FeedForwardWeights& weights)
    : context_(context),
      norm_(context.weights.vector(weights.norm)),
      network_(context, weights.gate_up, weights.down, LayerKind::kDense) {}

void CudaFeedForward::forward(Residual& x) {
  if (context_.is_one_token_step()) {
    sm90::OneTokenLayer& layer = context_.one_token.layer();
    layer.post_attention_norm = floats(norm_);
    layer.gate_up = network_.gate_up().weight();
    layer.down = network_.down().weight();
    return;
  }
  const Matrix h = context_.activations(context_.buffers.h, x.x.rows, x.x.columns);
  context_.rms_norm(x.x, norm_, context_.config.rms_norm_eps, h);
  x.normed_for = nullptr;
  if (!context_.exchange) return network_.run(context_, h, x.x, /*accumulate=*/true);
  const Matrix partial = context_.partial(x.x.rows);
  network_.run(context_, h, partial, /*accumulate=*/false);
  context_.exchange->add_sum(partial, x.x, {});
}

}  // namespace flash_mla::model
