#include "planner/evaluate.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "planner/check.h"
#include "planner/engine_step.h"
#include "planner/equations.h"
#include "planner/experts.h"

namespace flash_mla::planner {
namespace {

double weight_bytes(const std::string& format, std::int64_t scale_group) {
  if (format == "bf16") return 2;
  if (format == "fp8") return 1;
  return 0.5 + (scale_group > 0 ? 2.0 / static_cast<double>(scale_group) : 0);
}

double kv_bytes(const std::string& format, const Model& m) {
  const auto latent = static_cast<double>(m.kv_lora_rank), rope = static_cast<double>(m.qk_rope_head_dim);
  if (format == "bf16") return 2 * (latent + rope);
  if (format == "fp8_576") return latent + rope;
  return latent + 4 * latent / 128 + 2 * rope;  // FP8 latent, one fp32 scale per 128 of it, BF16 rope part
}

double num(std::int64_t value) { return static_cast<double>(value); }

void set_inputs(Values& v, const Request& q, PhaseKind kind, const Plan& p) {
  const Model& m = q.model;
  const Workload& w = q.workload;
  const Hardware& h = q.hardware;
  const bool article = q.mode == Mode::kArticle;
  v.set("L", num(m.num_layers));
  v.set("L_d", num(m.num_dense_layers));
  v.set("L_m", num(m.num_layers - m.num_dense_layers));
  v.set("d", num(m.hidden_size));
  v.set("n", num(m.num_heads));
  v.set("d_h", num(m.qk_nope_head_dim));
  v.set("d_R", num(m.qk_rope_head_dim));
  v.set("d_v", num(m.v_head_dim));
  v.set("d_c", num(m.kv_lora_rank));
  v.set("d_qc", num(m.q_lora_rank));
  v.set("d_e", num(m.moe_intermediate_size));
  v.set("d_ff", num(m.intermediate_size));
  v.set("E", num(m.num_routed_experts));
  v.set("k", num(m.num_experts_per_token));
  v.set("n_sh", num(m.num_shared_experts));
  v.set("V", num(m.vocab_size));
  v.set("n_emb", m.tied_embeddings ? 1 : 2);
  v.set("h_I", num(m.index_num_heads));
  v.set("d_I", num(m.index_head_dim));
  v.set("K_I", num(m.index_topk));
  v.set("n_hc", num(m.hc_mult));
  v.set("i_hc", num(m.hc_sinkhorn_iters));
  v.set("hc_fused", q.mhc_fused ? 1 : 0);
  v.set("TP", num(p.tp));
  v.set("EP", num(p.ep));
  v.set("DP", num(p.dp));
  v.set("PP", num(p.pp));
  v.set("CP", num(p.cp));
  v.set("G", num(h.cards_per_node));
  v.set("w_d", weight_bytes(q.precision.dense, 0));
  v.set("w_m", weight_bytes(q.precision.moe, q.precision.scale_group));
  v.set("a", q.precision.activation == "bf16" ? 2 : 1);
  v.set("kv_b", kv_bytes(q.precision.kv, m));

  const double cached = std::min(std::round(num(w.input) * w.prefix_hit), num(w.input) - 1);
  const double fresh = num(w.input) - cached;
  v.set("b", num(kind == PhaseKind::kPrefill ? w.prefill_batch : w.batch));
  v.set("s", kind == PhaseKind::kPrefill ? fresh : 1);
  v.set("c", cached);
  v.set("chunk", w.chunk > 0 ? std::min(num(w.chunk), fresh) : fresh);
  v.set("s_in", num(w.input));
  v.set("s_out", num(w.output));
  v.set("draft", num(w.mtp_draft));
  v.set("load", 1);
  if (!article) {
    const double tokens =
        kind == PhaseKind::kPrefill ? num(w.prefill_batch) * v["chunk"] : num(w.batch * (1 + w.mtp_draft));
    if (!w.expert_load.empty()) {
      const ExpertTraffic t =
          expert_traffic(w.expert_load, m.num_experts_per_token, p.ep, tokens * num(p.ep) / num(p.tp * p.cp));
      v.set("hist", 1);
      v.set("touched_hist", t.touched);
      v.set("load", t.load);
    }
    v.set("ranks", expected_ranks(m, p.ep, w.placement));
  }

  const double fp8_or_bf16 = h.peak_fp8 > 0 ? h.peak_fp8 : h.peak_bf16;
  v.set("C_attn", q.precision.attention == "fp8" ? h.peak_fp8 : h.peak_bf16);
  v.set("C_dense", q.precision.dense == "bf16" ? h.peak_bf16 : fp8_or_bf16);
  v.set("C_moe", q.precision.moe == "bf16" ? h.peak_bf16 : fp8_or_bf16);
  v.set("BW", h.memory_bandwidth);
  v.set("N_in", article ? h.nvlink_both_directions : h.nvlink_both_directions / 2);
  v.set("N_out", h.network_one_way);
  v.set("M_card", h.memory_bytes);
  v.set("M_reserve", h.reserve_bytes);
  v.set("e_ac", h.efficiency.attention_compute);
  v.set("e_am", h.efficiency.attention_memory);
  v.set("e_g", h.efficiency.gemm);
  v.set("e_m", h.efficiency.memory);
  v.set("e_n", h.efficiency.link);
  v.set("t_launch", h.efficiency.attention_launch_s);
  if (article) {
    // The article's own rounded totals where the model file carries them, else the same sums unrounded.
    const Parameters exact = count_parameters(m);
    v.set("P_act", m.article_active > 0 ? m.article_active : exact.active_non_attention);
    v.set("G_dense", m.article_dense > 0 ? m.article_dense : exact.dense);
    v.set("G_moe", m.article_moe > 0 ? m.article_moe : exact.shared + exact.routed);
  }
}

void add(Kinds& kinds, const char* name, double value) {
  if (value != 0) kinds.emplace_back(name, value);
}

double total(const Kinds& kinds) {
  double sum = 0;
  for (const auto& [name, value] : kinds) sum += value;
  return sum;
}

void fill_exact(Phase& p, const Values& v) {
  p.flop = {{"attention", v["F_attn"]}, {"projections", v["F_proj"]}, {"experts", v["F_moe"]}};
  add(p.flop, "dense_ffn", v["F_ffn"]);
  add(p.flop, "output_head", v["F_head"]);
  add(p.flop, "indexer", v["F_idx"]);
  add(p.flop, "mhc", v["F_hc"]);
  add(p.flop, "mtp", v["F_mtp"]);
  p.resident = {{"dense_weights", v["W_dense"]},   {"shared_experts", v["W_shared"]},
                {"routed_experts", v["W_routed"]}, {"kv_cache", v["M_kv"]},
                {"activations", v["M_act"]},       {"reserve", v["M_reserve"]}};
  add(p.resident, "mtp_weights", v["W_mtp"]);
  p.moved = {{"dense_weights", v["IO_proj"] + v["IO_idxw"] + v["IO_ffn"] + v["IO_head"] + v["IO_hcw"]},
             {"shared_experts", v["IO_shared"]},
             {"routed_experts", v["IO_routed"]},
             {"kv_read", v["IO_kv"]},
             {"kv_write", v["IO_kvw"]},
             {"activations", v["IO_act"]}};
  add(p.moved, "index_keys", v["IO_index"]);
  add(p.moved, "mtp", v["IO_mtp"]);
  add(p.sent, "experts", v["S_ep"]);
  add(p.sent, "tensor_parallel", v["S_tp"]);
  add(p.sent, "pipeline", v["S_pp"]);
  add(p.sent, "context_parallel", v["S_cp"]);
  p.operators_s = v["t_ops"];
  auto op = [&](const char* name, double flop, double bytes, const char* c, const char* m, const char* peak) {
    if (flop != 0 || bytes != 0) p.operators.push_back({name, flop, bytes, 0, v[c], v[m], 0, v[peak]});
  };
  op("attention", v["F_attn"], v["IO_kv"] + v["IO_kvw"] + v["A_attn"], "t_attn_c", "t_attn_m", "C_attn");
  op("projections", v["F_proj"], v["IO_proj"] + v["A_proj"], "t_proj_c", "t_proj_m", "C_dense");
  op("indexer", v["F_idx"], v["IO_index"] + v["IO_idxw"], "t_idx_c", "t_idx_m", "C_dense");
  op("experts", v["F_moe"], v["IO_shared"] + v["IO_routed"] + v["A_moe"], "t_moe_c", "t_moe_m", "C_moe");
  op("dense_ffn", v["F_ffn"], v["IO_ffn"] + v["A_ffn"], "t_ffn_c", "t_ffn_m", "C_dense");
  op("output_head", v["F_head"], v["IO_head"], "t_head_c", "t_head_m", "C_dense");
  op("mhc", v["F_hc"], v["A_hc"] + v["IO_hcw"], "t_hc_c", "t_hc_m", "C_attn");
  op("mtp", v["F_mtp"], v["IO_mtp"], "t_mtp_c", "t_mtp_m", "C_moe");
  auto link = [&](const char* name, const char* sent, const char* time) {
    if (v[sent] != 0) p.operators.push_back({name, 0, 0, v[sent], 0, 0, v[time], 0});
  };
  link("expert_exchange", "S_ep", "t_ep");
  link("tensor_parallel", "S_tp", "t_tp");
  link("pipeline", "S_pp", "t_pp");
  link("context_parallel", "S_cp", "t_cp");
  p.mfu = v["t_peak"];  // divided by the step time once that is known
  p.memory_share = v["M_total"] / v["M_card"];
}

void fill_article(Phase& p, const Values& v, PhaseKind kind) {
  constexpr double kGb = 1e9, kGib = 1024.0 * 1024 * 1024;
  const double attention = kind == PhaseKind::kPrefill ? v["F_mha"] : v["F_mla"];
  p.flop = {{"attention", attention / v["TP"]}, {"outside_attention", v["F_nonattn"] / v["EP"]}};
  p.resident = {{"weights", v["M_w"] * kGb},
                {"kv_cache", v["M_kv"] * kGib},
                {"activations", v["M_act"] * kGib},
                {"reserve", v["M_reserve"]}};
  p.moved = {{"weights", v["IO_w"] * kGb}, {"kv", v["IO_kv"] * kGib}, {"activations", v["IO_act"] * kGib}};
  add(p.sent, "experts", v["T_ep"] * kGib);
  add(p.sent, "tensor_parallel", v["T_tp"] * kGib);
  p.operators_s = v["t_overlap"];
  const double attention_bytes = (v["IO_kv"] + 2 * (v["M_linear"] + v["M_score"])) * kGib;
  const double other_bytes = v["IO_w"] * kGb + 2 * v["M_ffn"] * kGib;
  p.operators = {{"attention", p.flop[0].second, attention_bytes, 0, p.flop[0].second / v["C_attn"],
                  attention_bytes / v["BW"], 0, v["C_attn"]},
                 {"outside_attention", p.flop[1].second, other_bytes, 0, p.flop[1].second / v["C_moe"],
                  other_bytes / v["BW"], 0, v["C_moe"]}};
  p.mfu = v["F_card"] / v["C_moe"];
  p.memory_share = v["M_total"] * kGb / v["M_card"];
}

Phase run_phase(const Request& q, PhaseKind kind, Values& v) {
  Phase p;
  const bool prefill = kind == PhaseKind::kPrefill;
  p.plan = check_plan(prefill ? q.prefill_plan : q.decode_plan, q.model, prefill ? "prefill_plan" : "plan");
  p.cards = num(p.plan.tp * p.plan.cp * p.plan.dp * p.plan.pp);
  set_inputs(v, q, kind, p.plan);
  v.evaluate();
  if (q.mode == Mode::kArticle) {
    fill_article(p, v, kind);
  } else {
    fill_exact(p, v);
  }
  p.flop_total = total(p.flop);
  p.resident_total = total(p.resident);
  p.moved_total = total(p.moved);
  p.sent_total = total(p.sent);
  p.compute_s = v["t_comp"];
  p.memory_s = v["t_mem"];
  p.communication_s = v["t_comm"];
  p.serial_s = v["t_serial"];
  p.overlap_s = v["t_overlap"];
  p.full_s = v["t_full"];
  const double stage = q.overlap == "none"     ? p.serial_s
                       : q.overlap == "memory" ? p.overlap_s
                       : q.overlap == "full"   ? p.full_s
                                               : p.operators_s;
  p.step_s = stage * num(p.plan.pp);
  if (q.mode == Mode::kExact && q.hardware.engine && p.cards == 1)
    p.step_s = engine_seconds(engine_step(q, kind), *q.hardware.engine);
  p.mfu /= p.step_s / num(p.plan.pp);
  p.memory_ratio = p.memory_s / p.compute_s;
  p.communication_ratio = p.communication_s / p.compute_s;
  const double worst = std::max({p.compute_s, p.memory_s, p.communication_s});
  p.bottleneck = p.memory_share > 1     ? "memory capacity"
                 : worst == p.compute_s ? "compute"
                 : worst == p.memory_s  ? "memory bandwidth"
                                        : "communication";
  if (p.mfu < 0.6) p.flags.push_back(fmt::format("MFU {:.1f} % < 60 %", 100 * p.mfu));
  if (p.memory_share > 0.85) p.flags.push_back(fmt::format("memory {:.1f} % > 85 %", 100 * p.memory_share));
  if (p.memory_ratio > 0.5)
    p.flags.push_back(fmt::format("memory/compute time {:.2f} > 0.5", p.memory_ratio));
  if (p.communication_ratio > 0.5) {
    p.flags.push_back(fmt::format("communication/compute time {:.2f} > 0.5", p.communication_ratio));
  }
  return p;
}

/// Tokens a step yields on average: the first for certain, each draft while all before it were accepted.
double tokens_per_step(const Workload& w) {
  double expected = 1, chance = 1;
  for (std::int64_t i = 0; i < w.mtp_draft; ++i) {
    chance *= w.mtp_acceptance;
    expected += chance;
  }
  return expected;
}

/// Card-seconds that one request takes of a phase.
double prefill_card_seconds(const Phase& p, const Workload& w) {
  return p.step_s * num(p.plan.tp * p.plan.cp) / num(w.prefill_batch);
}
double decode_card_seconds(const Phase& p, const Workload& w) {
  return num(w.output) / tokens_per_step(w) * p.step_s * num(p.plan.tp * p.plan.cp) / num(w.batch);
}

void explain(Result& r, const Values& v, const char* phase) {
  for (const Equation& e : v.sheet().equations()) {
    r.steps.push_back({phase, e.name, e.text, v.sheet().substitute(e.text, v.all()), e.unit, e.meaning,
                       e.article_number, v[e.name]});
  }
}

void add_problem(Result& r, const Request& q, const Values& pv, const Values& dv) {
  const double card = q.hardware.memory_bytes;
  for (const auto& [name, p, v] :
       {std::tuple{"prefill", &r.prefill, &pv}, std::tuple{"decode", &r.decode, &dv}}) {
    if (p->memory_share <= 1) continue;
    const double weights = (*v)["M_w"] * (q.mode == Mode::kArticle ? 1e9 : 1);
    r.problem += fmt::format(
        "{}{} does not fit: {:.1f} GB needed per card, {} has {:.1f} GB (weights {:.1f} GB, "
        "reserve {:.1f} GB)",
        r.problem.empty() ? "" : "; ", name, p->memory_share * card / 1e9, q.hardware.name, card / 1e9,
        weights / 1e9, q.hardware.reserve_bytes / 1e9);
    if (weights + q.hardware.reserve_bytes >= card) {
      r.problem += "; the weights alone are too much: raise ep, tp or pp, or use a smaller weight format";
    } else if (std::string_view(name) == "decode") {
      r.problem += r.max_sequences >= 1
                       ? fmt::format("; at most workload.batch = {:.0f} fits", r.max_sequences)
                       : "; not even one sequence fits: raise ep, or shorten the input or output";
    } else {
      r.problem += "; lower workload.prefill_batch or workload.chunk";
    }
  }
}

}  // namespace

Values evaluate_sheet(const Request& q, PhaseKind kind) {
  Values v(sheet(q.mode, kind));
  set_inputs(v, q, kind, kind == PhaseKind::kPrefill ? q.prefill_plan : q.decode_plan);
  v.evaluate();
  return v;
}

Parameters count_parameters(const Model& m) {
  Request q;  // the counts need no hardware; anything finite does
  q.model = m;
  q.hardware.peak_bf16 = q.hardware.memory_bytes = q.hardware.memory_bandwidth = 1;
  q.hardware.nvlink_both_directions = q.hardware.network_one_way = 1;
  const Values v = evaluate_sheet(q, PhaseKind::kDecode);
  return {v["N_dense"], v["N_shared"], v["N_routed"], v["N_total"], v["N_active"], v["L"] * v["P_mla"]};
}

double price_per_card_hour(const Prices& p) {
  if (p.card_hour > 0) return p.card_hour;
  const double purchase = p.card_price > 0 ? p.card_price / (p.years * 365 * 24) : 0;
  return purchase + p.power_w / 1000 * p.pue * p.electricity_kwh + p.other_hour;
}

Result evaluate(const Request& q, bool with_steps) {
  check_request(q);
  check_plan(q.decode_plan, q.model, "plan");  // before prefill's, which repeats it unless given
  Result r;
  Values pv(sheet(q.mode, PhaseKind::kPrefill)), dv(sheet(q.mode, PhaseKind::kDecode));
  r.prefill = run_phase(q, PhaseKind::kPrefill, pv);
  r.decode = run_phase(q, PhaseKind::kDecode, dv);
  const Workload& w = q.workload;
  const bool article = q.mode == Mode::kArticle;

  const double capacity =
      article ? dv["M_card"] / 1e9 - dv["M_reserve"] / 1e9 : dv["M_card"] - dv["M_reserve"];
  const double per_sequence = (dv["M_kv"] + dv["M_act"]) / num(w.batch);
  r.max_sequences = std::max(0.0, std::floor((capacity - dv["M_w"]) / per_sequence));
  r.chunk_knee = pv["knee"];
  if (!article) {
    r.crossover_decode_flop = dv["x_flop"];
    r.crossover_decode_bytes = dv["x_bytes"];
    r.crossover_prefill_flop = dv["x_prefill"];
  }
  r.fits = r.prefill.memory_share <= 1 && r.decode.memory_share <= 1;
  if (!r.fits) add_problem(r, q, pv, dv);

  const double per_step = tokens_per_step(w);
  r.ttft_s = r.prefill.step_s;
  r.tpot_s = r.decode.step_s / per_step;
  double prefill_cost = prefill_card_seconds(r.prefill, w), decode_cost = decode_card_seconds(r.decode, w);
  r.prefill_tokens_per_s_card = num(w.input) / prefill_cost;
  r.decode_tokens_per_s_card = num(w.output) / decode_cost;
  double input = num(w.input), output = num(w.output);
  if (!w.mix.empty()) {
    double shares = 0;
    prefill_cost = decode_cost = input = output = 0;
    for (const RequestShape& shape : w.mix) {
      Request one = q;
      one.workload.mix.clear();
      one.workload.arrival_rate = 0;
      one.workload.input = shape.input;
      one.workload.output = shape.output;
      const Result part = evaluate(one);
      if (!part.fits) {
        throw InvalidArgument(fmt::format("workload.mix entry input {} output {}: {}", shape.input,
                                          shape.output, part.problem));
      }
      prefill_cost += shape.share * num(shape.input) / part.prefill_tokens_per_s_card;
      decode_cost += shape.share * num(shape.output) / part.decode_tokens_per_s_card;
      input += shape.share * num(shape.input);
      output += shape.share * num(shape.output);
      shares += shape.share;
    }
    for (double* sum : {&prefill_cost, &decode_cost, &input, &output}) *sum /= shares;
  }
  r.pd_ratio = prefill_cost / decode_cost;
  r.tokens_per_s_card = output / (prefill_cost + decode_cost);
  if (w.arrival_rate > 0) {
    // Whole groups only, and strictly more capacity than load, else the queue would never drain.
    r.prefill_cards = r.prefill.cards * (std::floor(w.arrival_rate * prefill_cost / r.prefill.cards) + 1);
    r.decode_cards = r.decode.cards * (std::floor(w.arrival_rate * decode_cost / r.decode.cards) + 1);
    const double rho = w.arrival_rate * prefill_cost / r.prefill_cards;
    r.prefill_wait_s = rho / (2 * (1 - rho)) * r.prefill.step_s / num(r.prefill.plan.pp);
    r.ttft_s += r.prefill_wait_s;
  }
  r.card_hour = price_per_card_hour(q.prices);
  if (r.card_hour > 0) {
    const double per_card_second = r.card_hour / 3600;
    r.cost_per_million_input = 1e6 * per_card_second * prefill_cost / input;
    r.cost_per_million_output = 1e6 * per_card_second * decode_cost / output;
    r.cost_per_million_total = 1e6 * per_card_second * (prefill_cost + decode_cost) / output;
    r.tco_hour = r.card_hour * (r.prefill_cards + r.decode_cards);
  }
  r.meets_slo = r.fits && (q.slo.ttft_s == 0 || r.ttft_s <= q.slo.ttft_s) &&
                (q.slo.tpot_s == 0 || r.tpot_s <= q.slo.tpot_s);

  if (!article && q.hardware.peak_fp8 == 0 && (q.precision.dense != "bf16" || q.precision.moe != "bf16")) {
    r.notes.push_back(fmt::format("{} has no FP8 units: 8- and 4-bit weights are multiplied at the BF16 rate",
                                  q.hardware.name));
  }
  if (article && q.model.article_moe == 0) {
    r.notes.push_back(fmt::format(
        "{} has no rounded totals from the article; its exact parameter counts are used", q.model.name));
  }
  if (article && (q.hardware.efficiency.gemm != 1 || q.hardware.efficiency.attention_compute != 1 ||
                  q.hardware.efficiency.memory != 1 || q.hardware.efficiency.attention_memory != 1)) {
    r.notes.push_back("mode article ignores the profile's measured efficiencies");
  }
  if (with_steps) {
    explain(r, pv, "prefill");
    explain(r, dv, "decode");
  }
  return r;
}

}  // namespace flash_mla::planner
