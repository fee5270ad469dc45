#include "model/device/cuda/head.h"

#include <vector>

#include "kernels/rows/sm90/rows.h"
#include "kernels/sampling/sm90/draw_rows.h"
#include "kernels/sampling/sm90/token_rules.h"

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
  if (!context_.exchange) {
    weight_->multiply(context_, last, logits);
    return logits;
  }
  std::vector<Range> parts;
  parts.reserve(static_cast<std::size_t>(context_.partition.size));
  for (int rank = 0; rank < context_.partition.size; ++rank)
    parts.push_back(context_.partition.share(config.vocab_size, rank));
  const Range own = context_.partition.share(config.vocab_size);
  weight_->multiply(context_, last, logits.column_range(own.first, own.count));
  context_.exchange->gather_columns(logits, parts);
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

void choose_tokens_among(CudaContext& context, std::int64_t first, std::span<const TokenRule> rules) {
  const auto rows = static_cast<std::int64_t>(context.step->logit_rows.size());
  const Matrix logits =
      context.activations(context.buffers.logits, rows, context.config.vocab_size, DType::kFloat32);
  sm90::apply_token_rules(
      logits, context.rules.upload(first, rules, context.config.vocab_size, *context.pool, context.stream),
      context.stream);
  choose_tokens(context, logits);
}

}  // namespace flash_mla::model
