#include "model/device/cuda/feed_forward.h"

namespace flash_mla::model {

CudaFeedForward::CudaFeedForward(CudaContext& context, const FeedForwardWeights& weights)
    : context_(context),
      norm_(context.weights.vector(weights.norm)),
      gate_up_(context, weights.gate_up, {}, LayerKind::kDense),
      down_(context, weights.down, {}, LayerKind::kDense),
      intermediate_(weights.down.columns) {}

void CudaFeedForward::forward(Residual& x) {
  if (context_.is_one_token_step()) {
    sm90::OneTokenLayer& layer = context_.one_token.layer();
    layer.post_attention_norm = floats(norm_);
    layer.gate_up = gate_up_.weight();
    layer.down = down_.weight();
    return;
  }
  const Matrix h = context_.activations(context_.buffers.h, x.x.rows, x.x.columns);
  const Matrix act = context_.activations(context_.buffers.act, x.x.rows, intermediate_);
  context_.rms_norm(x.x, norm_, context_.config.rms_norm_eps, h);
  x.normed_for = nullptr;
  if (gate_up_.add_feed_forward(context_, h, down_, x.x)) return;
  gate_up_.multiply_silu_mul(context_, h, act);
  down_.multiply_add(context_, act, x.x);
}

}  // namespace flash_mla::model
