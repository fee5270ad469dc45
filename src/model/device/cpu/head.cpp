#include "model/device/cpu/head.h"

#include <limits>
#include <utility>

#include "kernels/sampling/cpu/draw.h"
#include "model/device/cpu/reduced_linear.h"

namespace flash_mla::model {
namespace {

// The token of the largest logit, the first among equals; -1 where one is NaN or +inf, or all are -inf.
std::int32_t likeliest(std::span<const float> logits) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float largest = -kInfinity;
  std::int32_t best = -1;
  bool bad = false;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    bad |= !(logits[i] < kInfinity);  // NaN, +inf
    if (logits[i] > largest) {
      largest = logits[i];
      best = static_cast<std::int32_t>(i);
    }
  }
  return bad ? -1 : best;
}

}  // namespace

CpuHead::CpuHead(CpuContext& context, const HeadWeights& weights)
    : context_(context),
      norm_(weights.norm),
      weight_(std::make_shared<CpuLinear>(context, weights.weight, LayerKind::kHead)) {}

CpuHead::CpuHead(const CpuHead& other, std::vector<float> norm)
    : context_(other.context_), norm_(std::move(norm)), weight_(other.weight_) {}

Matrix CpuHead::forward(const Residual& x) {
  const ModelConfig& config = context_.config;
  const auto rows = static_cast<std::int64_t>(context_.step->logit_rows.size());
  if (rows == 0) return {};
  const Matrix last = context_.activations(context_.buffers.logit_h, rows, config.hidden_size);
  const Matrix logits = CpuContext::matrix(context_.buffers.logits, DType::kFloat32, rows, config.vocab_size);
  context_.gather_logit_rows(x.x, last);
  context_.rms_norm(last, norm_, config.rms_norm_eps, last);
  if (context_.partition.alone()) {
    weight_->multiply(context_, last, logits);
  } else {
    const Range own = context_.partition.share(config.vocab_size);
    weight_->multiply(context_, last, logits.column_range(own.first, own.count));
    gather_columns(context_, logits, shares(context_.partition, config.vocab_size));
  }
  return logits;
}

void choose_tokens(const CpuContext& context, const Matrix& logits, std::int32_t* tokens,
                   std::span<const TokenRule> rules) {
  const Step& step = *context.step;
  const std::int64_t first = step.first_chosen;
  context.for_rows(logits.rows - first, logits.columns, [&](std::int64_t i) {
    const std::span row(reinterpret_cast<float*>(logits.row(first + i)),
                        static_cast<std::size_t>(logits.columns));
    std::int32_t& token = tokens[first + i];
    token = likeliest(row);
    const TokenRule rule = rules.empty() ? TokenRule() : rules[static_cast<std::size_t>(i)];
    if (token >= 0 && !rule.changes_nothing()) {
      cpu::apply_rule(row, rule);
      token = likeliest(row);
    }
    const Draw draw = step.draws.empty() ? Draw() : step.draws[static_cast<std::size_t>(first + i)];
    if (token < 0 || draw.scale == 0) return;
    thread_local cpu::DrawScratch scratch;
    token = cpu::draw_token(row, row[static_cast<std::size_t>(token)], draw, scratch);
  });
}

}  // namespace flash_mla::model
