#pragma once

// The planner: what a DeepSeek-style model needs of compute, memory capacity, memory bandwidth and
// communication on given hardware under a given parallel plan, which of the four is the bottleneck, and what
// to change. Pure arithmetic; needs no device. docs/planner.md has the equations and the file formats.
//
// Two ways in: plain structs (evaluate), and JSON (run_json), which the flash-mla program and the Python
// package use and which adds sweeps, comparisons and calibration.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flash_mla/error.h"

namespace flash_mla::planner {

enum class Mode {
  kArticle,  ///< the source article's formulas, constants and unit conventions, its shortcuts included
  kExact,  ///< every correction applied: projections, distinct experts, steady-state load, one-way links, ...
};

/// Architecture, as in a Hugging Face config.json. Counts are exact integers; 0 means "the model has none".
struct Model {
  std::string name;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_dense_layers = 0;  ///< first_k_dense_replace
  std::int64_t num_heads = 0;
  std::int64_t q_lora_rank = 0;  ///< 0: queries are projected directly
  std::int64_t kv_lora_rank = 0;
  std::int64_t qk_nope_head_dim = 0;
  std::int64_t qk_rope_head_dim = 0;
  std::int64_t v_head_dim = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t num_routed_experts = 0;
  std::int64_t num_shared_experts = 0;
  std::int64_t num_experts_per_token = 0;
  std::int64_t n_group = 1;
  std::int64_t topk_group = 1;
  std::int64_t vocab_size = 0;
  std::int64_t max_position_embeddings = 0;
  bool tied_embeddings = false;
  std::int64_t num_mtp_layers = 0;
  std::int64_t index_num_heads = 0;  ///< the sparse-attention indexer of V3.2
  std::int64_t index_head_dim = 0;
  std::int64_t index_topk = 0;
  std::int64_t hc_mult = 0;  ///< residual streams of manifold-constrained hyper-connections (mHC)
  std::int64_t hc_sinkhorn_iters = 0;
  /// Rounded totals the article computes with, in parameters; 0 means "derive from the architecture".
  double article_active = 0, article_dense = 0, article_moe = 0;
};

/// Fractions of the peaks that an operator reaches, 1 unless measured. Written by `flash-mla plan calibrate`.
struct Efficiency {
  double attention_compute = 1;
  double attention_memory = 1;
  double attention_launch_s = 0;  ///< fixed seconds per attention call
  double gemm = 1;
  double memory = 1;
  double link = 1;
};

/// What an engine on one card takes for what a step does, fitted to `flash-mla bench-engine` by `flash-mla plan calibrate`.
/// The first nine multiply times at the card's peaks.
struct EngineCosts {
  double weights = 1;      ///< reading 16-bit weights
  double quantised = 1;    ///< reading weights of 8 or 4 bits
  double cache = 1;        ///< reading the cache
  double index = 1;        ///< reading index keys
  double gemm = 1;         ///< products, at the BF16 peak
  double attention = 1;    ///< attention of decode steps, at the BF16 peak
  double prompts = 1;      ///< attention of prompts, at the BF16 peak
  double scores = 1;       ///< the indexer's scores, at the BF16 peak
  double activations = 1;  ///< moving ten hidden states for each token and layer
  double layer_s = 0;      ///< for each layer and pass
  double indexer_s = 0;    ///< for each indexer and pass
  double pass_s = 0;       ///< for each pass
};

/// One card and the server around it. SI units throughout: FLOP/s, bytes, bytes/s.
struct Hardware {
  std::string name;
  double peak_bf16 = 0;
  double peak_fp8 = 0;  ///< 0: no FP8 units; FP8 weights are then multiplied at the BF16 rate
  double memory_bytes = 0;
  double memory_bandwidth = 0;
  double nvlink_both_directions = 0;
  double network_one_way = 0;
  std::int64_t cards_per_node = 8;
  double reserve_bytes = 10e9;
  Efficiency efficiency;
  std::optional<EngineCosts> engine;  ///< plans of one card are timed by these, where given
};

/// Parallel plan. dp = 0 means ep / (tp * cp), at least 1: as many attention groups as the EP group holds.
struct Plan {
  std::int64_t tp = 1, ep = 1, dp = 0, pp = 1, cp = 1;
};

/// Formats by name, see docs/planner.md: attention bf16|fp8, dense bf16|fp8, moe bf16|fp8|w4a8,
/// kv bf16|fp8_656|fp8_576, activation bf16|fp8.
struct Precision {
  std::string attention = "bf16";
  std::string dense = "fp8";
  std::string moe = "fp8";
  std::string kv = "fp8_656";
  std::string activation = "bf16";
  std::int64_t scale_group = 0;  ///< INT4 weights per 2-byte scale; 0 leaves the scales out
};

struct RequestShape {
  std::int64_t input = 3260, output = 1100;
  double share = 1;
};

struct Workload {
  std::int64_t input = 3260;       ///< prompt tokens
  std::int64_t output = 1100;      ///< generated tokens
  std::int64_t batch = 32;         ///< decoding sequences per data-parallel rank
  std::int64_t prefill_batch = 1;  ///< prompts per data-parallel rank and prefill pass
  std::int64_t chunk = 0;          ///< prompt tokens per prefill chunk; 0: the whole prompt at once
  double prefix_hit = 0;           ///< share of prompt tokens found in the prefix cache, [0, 1)
  double arrival_rate = 0;         ///< requests per second to the whole deployment; 0: not given
  std::int64_t mtp_draft = 0;      ///< draft tokens per step
  double mtp_acceptance = 0;       ///< chance that a draft token is accepted, given that those before it were
  std::string placement =
      "uniform";                    ///< uniform|linear|round_robin, for the ranks a token reaches in prefill
  std::vector<double> expert_load;  ///< measured tokens per routed expert; empty: uniform
  std::vector<RequestShape> mix;    ///< request mix for the P:D ratio; empty: just input and output
};

/// Service levels in seconds; 0: not given.
struct Slo {
  double ttft_s = 0, tpot_s = 0;
};

/// Prices in any one currency. card_hour wins over the purchase figures when both are given.
struct Prices {
  double card_hour = 0;
  double card_price = 0, years = 0, power_w = 0, pue = 1, electricity_kwh = 0, other_hour = 0;
};

struct Request {
  Mode mode = Mode::kExact;
  Model model;
  Hardware hardware;
  Plan prefill_plan, decode_plan;
  Precision precision;
  Workload workload;
  Slo slo;
  Prices prices;
  std::string overlap = "operators";  ///< none|memory|operators|full: which times hide behind which
  bool mhc_fused = false;
};

using Kinds = std::vector<std::pair<std::string, double>>;

/// One row of the roofline: what an operator does on one card in one pass.
struct Operator {
  std::string name;
  double flop = 0, bytes = 0, sent = 0;
  double compute_s = 0, memory_s = 0, communication_s = 0;
  double peak = 0;  ///< FLOP/s it is held against
};

/// One equation with its numbers, for --explain.
struct Step {
  std::string phase, name, text, substituted, unit, meaning;
  int article_number = 0;
  double value = 0;
};

/// Per card and pass: a whole prefill pass, or one decode step.
struct Phase {
  Plan plan;
  Kinds flop, resident, moved, sent;  ///< FLOP, bytes, bytes, bytes
  double flop_total = 0, resident_total = 0, moved_total = 0, sent_total = 0;
  double compute_s = 0, memory_s = 0, communication_s = 0;
  double serial_s = 0;     ///< nothing overlaps
  double overlap_s = 0;    ///< max(compute, memory) + communication
  double operators_s = 0;  ///< each operator's max(compute, memory), plus communication
  double full_s = 0;       ///< max of the three
  double step_s = 0;       ///< the one `overlap` chose, times the pipeline's stages
  double mfu = 0, memory_share = 0, memory_ratio = 0, communication_ratio = 0;
  double cards = 0;        ///< cards of one group: tp * cp * dp * pp
  std::string bottleneck;  ///< compute, memory bandwidth, communication or memory capacity
  std::vector<std::string> flags;
  std::vector<Operator> operators;
};

struct Result {
  Phase prefill, decode;
  double ttft_s = 0, tpot_s = 0;
  double prefill_tokens_per_s_card = 0, decode_tokens_per_s_card = 0;
  double max_sequences = 0;      ///< decoding sequences per data-parallel rank that fit
  double chunk_knee = 0;         ///< prompt tokens per chunk at which weight reads hide behind arithmetic
  double pd_ratio = 0;           ///< prefill cards per decode card
  double tokens_per_s_card = 0;  ///< output tokens per second and card, prefill cards included
  double card_hour = 0, cost_per_million_output = 0, cost_per_million_input = 0, cost_per_million_total = 0;
  double prefill_cards = 0, decode_cards = 0, tco_hour = 0, prefill_wait_s = 0;  ///< at the arrival rate
  double crossover_decode_flop = 0, crossover_decode_bytes = 0, crossover_prefill_flop = 0;
  bool fits = false, meets_slo = false;
  std::string problem;  ///< why it does not fit, and what would
  std::vector<std::string> notes;
  std::vector<Step> steps;  ///< only with explain
};

/// Evaluates one plan. A plan that does not fit comes back with fits = false and `problem` set.
/// Throws InvalidArgument for values that mean nothing (batch 0, EP not dividing the experts, TP over heads,
/// ...).
Result evaluate(const Request& request, bool explain = false);

/// Runs one request in JSON and returns its result in JSON. The request's "command" is one of plan, compare,
/// sweep, calibrate, tables, list (plan when left out); docs/planner.md gives the schema.
/// Throws InvalidArgument naming the file (or "request"), the key, the value and what is allowed.
/// Reads the files the request names; writes none.
std::string run_json(std::string_view request);

/// Writes a result of run_json as "table", "csv" or "json" (indented).
std::string render(std::string_view result_json, std::string_view format);

}  // namespace flash_mla::planner
