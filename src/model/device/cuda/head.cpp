#include "model/device/cuda/head.h"

#include "kernels/rows/sm90/rows.h"
#include "kernels/sampling/sm90/draw_rows.h"

namespace flash_mla::model {

CudaHead::CudaHead(CudaContext& context, const HeadWeights& weights)
    : context_(context),
      norm_(context.weights.vector(weights.norm)),
      weight_(std::make_shared<CudaLinear>(context, weights.weight, std::span<const float>(),
                                           LayerKind::kHead)) {}

CudaHead::CudaHead(const CudaHead& other, std::span<const float> norm)
    : context_(other.context_), norm_(context_.weights.vector(norm)), weight_(other.weight_) {}

Matrix CudaHead::forward(const Residual& x) {
  const ModelConfig& config = context_.config;
  context_.finish_layers(x.x);
  const auto rows = static_cast<std::int64_t>(context_.step->logit_rows.size());
  if (rows == 0) return {};
  const Matrix last = context_.activations(context_.buffers.logit_h, rows, config.hidden_size);
  sm90::gather(x.x, context_.data.logit_rows, last, context_.stream);
  context_.rms_norm(last, norm_, config.rms_norm_eps, last);
  const Matrix logits =
      context_.activations(context_.buffers.logits, rows, config.vocab_size, DType::kFloat32);
  weight_->multiply(context_, last, logits);
  return logits;
}

void choose_tokens(CudaContext& context, const Matrix& logits) {
  const Step& step = *context.step;
  if (logits.rows == 0) return;
  const Matrix tokens = context.activations(context.buffers.tokens, logits.rows, 1, DType::kInt32);
  if (step.first_chosen == logits.rows) return;
  auto* out = reinterpret_cast<std::int32_t*>(tokens.data);
  sm90::likeliest(logits, out, context.buffers.likeliest_scratch.data(), context.stream);
  if (!step.draws.empty()) sm90::draw_rows(logits, context.data.draws, out, context.stream);
}

}  // namespace flash_mla::model
