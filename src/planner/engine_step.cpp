#include "planner/engine_step.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace flash_mla::planner {
namespace {

double num(std::int64_t value) { return static_cast<double>(value); }

/// Bytes of a weight with its share of a scale, as the engine's kernels take them.
double weight_bytes(const std::string& format) {
  if (format == "bf16") return 2;
  return format == "fp8" ? 1 + 4.0 / 1024 : 0.5 + 4.0 / 128;
}

/// What the model's parts have, of one layer where nothing else is said.
struct Parts {
  explicit Parts(const Model& m)
      : hidden(num(m.hidden_size)),
        heads(num(m.num_heads)),
        latent(num(m.kv_lora_rank)),
        nope(num(m.qk_nope_head_dim)),
        rope(num(m.qk_rope_head_dim)),
        v(num(m.v_head_dim)),
        q_rank(num(m.q_lora_rank)),
        indexer(num(m.index_num_heads)),
        index_dim(num(m.index_head_dim)) {
    const double q = q_rank > 0 ? q_rank * (hidden + heads * (nope + rope)) : hidden * heads * (nope + rope);
    attention = q + (latent + rope) * hidden + heads * v * hidden;
    absorbed = heads * latent * (nope + v);
    if (indexer > 0) of_indexer = indexer * index_dim * q_rank + index_dim * hidden + 2 * indexer * hidden;
    expert = 3 * hidden * num(m.moe_intermediate_size);
    dense = 3 * hidden * num(m.intermediate_size);
    head = hidden * num(m.vocab_size);
  }
  double hidden, heads, latent, nope, rope, v, q_rank, indexer, index_dim;
  double attention = 0, absorbed = 0, of_indexer = 0, expert = 0, dense = 0, head = 0;
};

/// Adds up a pass's bytes and FLOP.
class StepSum {
 public:
  explicit StepSum(const Request& q)
      : q_(q),
        m_(q.model),
        p_(q.model),
        attention_bytes_(weight_bytes(q.precision.dense)),
        expert_bytes_(weight_bytes(q.precision.moe)) {}

  /// Weights of `dense` and `mixture` layers, which `passes` read for `tokens` in all, `chunk` at a time.
  void layers(double dense, double mixture, double tokens, double chunk, double passes) {
    const double experts = num(m_.num_routed_experts), chosen = num(m_.num_experts_per_token);
    const double touched = experts * (1 - std::pow(1 - chosen / experts, chunk));
    const double all = dense + mixture, shared = num(m_.num_shared_experts);
    read(2, passes * (all * p_.absorbed + dense * p_.dense));
    read(4, passes * mixture * p_.hidden * experts);  // the router's
    read(attention_bytes_, passes * all * (p_.attention + p_.of_indexer));
    read(expert_bytes_, passes * mixture * p_.expert * (touched + shared));
    const double products = all * (p_.attention + p_.absorbed + p_.of_indexer) + dense * p_.dense +
                            mixture * p_.expert * (chosen + shared);
    out_[4] += 2 * tokens * products / q_.hardware.peak_bf16;
    out_[8] += tokens * all * 10 * p_.hidden * 2 / q_.hardware.memory_bandwidth;
    out_[9] += passes * all;
    if (p_.indexer > 0) out_[10] += passes * all;
    out_[11] += passes;
  }
  void head(double rows) {
    read(2, p_.head);
    out_[4] += 2 * rows * p_.head / q_.hardware.peak_bf16;
  }
  /// Of `layers` layers: `tokens` of `sequences`, each of which sees `context` others.
  void decode_attention(double layers, double sequences, double tokens, double context) {
    const bool chooses = p_.indexer > 0 && context > num(m_.index_topk);
    const double seen = chooses ? num(m_.index_topk) : context;
    const double row = q_.precision.kv == "bf16" ? 2 * (p_.latent + p_.rope) : 656;
    out_[2] += sequences * seen * layers * row / q_.hardware.memory_bandwidth;
    attend(5, layers * tokens * seen * (2 * p_.latent + p_.rope));
    if (!chooses) return;
    out_[3] += sequences * context * layers * (p_.index_dim + 4) / q_.hardware.memory_bandwidth;
    score(layers * tokens * context);
  }
  void prompt_attention(double layers, double tokens) {
    const double most = num(m_.index_topk), pairs = tokens * (tokens + 1) / 2;
    const bool chooses = p_.indexer > 0 && tokens > most;
    if (!chooses) return attend(6, layers * pairs * (p_.nope + p_.rope + p_.v));
    attend(6, layers * (most * (most + 1) / 2 + most * (tokens - most)) * (2 * p_.latent + p_.rope));
    score(layers * pairs);
  }
  /// The module's input, which two hidden states are multiplied to.
  void module_input(double tokens) {
    const double weights = 2 * p_.hidden * p_.hidden;
    read(2, weights);
    out_[4] += 2 * tokens * weights / q_.hardware.peak_bf16;
  }
  const EngineStep& result() const { return out_; }

 private:
  void read(double bytes, double weights) {
    const bool quantised = bytes < 2;
    out_[quantised ? 1 : 0] += bytes * weights / q_.hardware.memory_bandwidth;
  }
  void attend(std::size_t cost, double flop) { out_[cost] += 2 * flop * p_.heads / q_.hardware.peak_bf16; }
  void score(double pairs) { out_[7] += 2 * pairs * p_.indexer * p_.index_dim / q_.hardware.peak_bf16; }

  const Request& q_;
  const Model& m_;
  Parts p_;
  double attention_bytes_, expert_bytes_;
  EngineStep out_{};
};

std::array<double, kEngineCosts> as_array(const EngineCosts& e) {
  return {e.weights, e.quantised, e.cache,       e.index,   e.gemm,      e.attention,
          e.prompts, e.scores,    e.activations, e.layer_s, e.indexer_s, e.pass_s};
}

}  // namespace

EngineStep engine_step(const Request& q, PhaseKind kind) {
  const Workload& w = q.workload;
  const double all = num(q.model.num_layers), dense = num(q.model.num_dense_layers);
  StepSum step(q);
  if (kind == PhaseKind::kPrefill) {
    const double cached = std::min(std::round(num(w.input) * w.prefix_hit), num(w.input) - 1);
    const double fresh = num(w.input) - cached, prompts = num(w.prefill_batch);
    const double chunk = w.chunk > 0 ? std::min(num(w.chunk), fresh) : fresh;
    step.layers(dense, all - dense, prompts * fresh, prompts * chunk, std::ceil(fresh / chunk));
    step.head(prompts);
    step.prompt_attention(all * prompts, fresh);
    return step.result();
  }
  const double sequences = num(w.batch), tokens = sequences * num(1 + w.mtp_draft);
  const double context = num(w.input) + num(w.output) / 2;
  step.layers(dense, all - dense, tokens, tokens, 1);
  step.head(tokens);
  step.decode_attention(all, sequences, tokens, context);
  // The first application goes over the step's tokens, the others over one of each sequence.
  for (std::int64_t i = 0; i < w.mtp_draft; ++i) {
    const double rows = i == 0 ? tokens : sequences;
    step.module_input(rows);
    step.layers(0, 1, rows, rows, 1);
    step.head(sequences);
    step.decode_attention(1, sequences, rows, context);
  }
  return step.result();
}

double engine_seconds(const EngineStep& step, const EngineCosts& costs) {
  const EngineStep cost = as_array(costs);
  double sum = 0;
  for (std::size_t i = 0; i < kEngineCosts; ++i) sum += step[i] * cost[i];
  return sum;
}

// Of a quadratic with bounds: one cost after the other, until nothing moves.
EngineCosts fit_engine(const std::vector<EngineRow>& rows) {
  if (rows.size() < kEngineCosts) {
    throw InvalidArgument(
        fmt::format("rows = {}: expected at least {} steps for as many unknowns", rows.size(), kEngineCosts));
  }
  const EngineStep low = as_array({});
  std::array<EngineStep, kEngineCosts> products{};
  EngineStep wanted{}, x = low;
  // In units of each column's largest share of a step, so that seconds and factors are alike.
  EngineStep unit{};
  for (const EngineRow& row : rows) {
    for (std::size_t i = 0; i < kEngineCosts; ++i) unit[i] = std::max(unit[i], row.step[i] / row.seconds);
  }
  for (const EngineRow& row : rows) {
    for (std::size_t i = 0; i < kEngineCosts; ++i) {
      wanted[i] += row.step[i] / row.seconds;
      for (std::size_t j = 0; j < kEngineCosts; ++j)
        products[i][j] += row.step[i] * row.step[j] / (row.seconds * row.seconds);
    }
  }
  for (int sweep = 0; sweep < 20000; ++sweep) {
    double moved = 0;
    for (std::size_t i = 0; i < kEngineCosts; ++i) {
      if (unit[i] == 0) continue;
      double slope = -wanted[i];
      for (std::size_t j = 0; j < kEngineCosts; ++j) slope += products[i][j] * x[j];
      const double next = std::max(low[i], x[i] - slope / products[i][i]);
      moved = std::max(moved, std::abs(next - x[i]) * unit[i]);
      x[i] = next;
    }
    if (moved < 1e-9) break;
  }
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11]};
}

}  // namespace flash_mla::planner
