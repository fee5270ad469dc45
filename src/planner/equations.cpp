#include "planner/equations.h"

namespace flash_mla::planner {
namespace {

// Names follow docs/planner.md: L layers, d hidden size, n heads, d_h/d_R/d_v head dims, d_c/d_qc latent
// ranks, E experts, k experts per token, b batch, s new tokens, s' attended length, P_* parameters, F_* FLOP,
// M_* resident bytes, IO_* bytes moved, S_* bytes sent, t_* seconds. Everything is per card unless it says
// not.
std::vector<std::string> inputs() {
  return {// model
          "L", "L_d", "L_m", "d", "n", "d_h", "d_R", "d_v", "d_c", "d_qc", "d_e", "d_ff", "E", "k", "n_sh",
          "V", "n_emb", "h_I", "d_I", "K_I", "n_hc", "i_hc", "hc_fused",
          // plan
          "TP", "EP", "DP", "PP", "CP", "G",
          // bytes per element or parameter
          "w_d", "w_m", "a", "kv_b",
          // workload
          "b", "s", "c", "chunk", "s_in", "s_out", "draft", "hist", "touched_hist", "load", "ranks",
          // hardware
          "C_attn", "C_dense", "C_moe", "BW", "N_in", "N_out", "M_card", "M_reserve", "e_ac", "e_am", "e_g",
          "e_m", "e_n", "t_launch",
          // the article's rounded parameter totals
          "P_act", "G_dense", "G_moe"};
}

const std::vector<Equation> kParameters = {
    {"X", "TP*CP", "cards", "cards that share one attention group's tokens"},
    {"P_q", "if(d_qc, d*d_qc + d_qc*n*(d_h + d_R), d*n*(d_h + d_R))", "params",
     "query projections, one layer"},
    {"P_mla", "P_q + d*(d_c + d_R) + d_c*n*(d_h + d_v) + n*d_v*d", "params",
     "all MLA projections, one layer"},
    {"P_idx", "if(h_I, d_qc*h_I*d_I + d*d_I + d*h_I, 0)", "params", "sparse-attention indexer, one layer"},
    {"P_exp", "3*d*d_e", "params", "one expert"},
    {"P_ffn", "3*d*d_ff", "params", "one dense FFN"},
    {"P_gate", "d*E", "params", "one router"},
    {"P_head", "V*d", "params", "output head (and the embedding again, unless tied)"},
    {"P_norm", "L*(d_qc + d_c + 2*d) + d", "params", "RMSNorm vectors"},
    {"P_hc", "if(n_hc, 2*L*n_hc*d*(n_hc^2 + 2*n_hc), 0)", "params", "mHC mixing weights, twice per layer"},
    {"N_dense", "L*(P_mla + P_idx) + L_d*P_ffn + L_m*P_gate + n_emb*P_head + P_norm + P_hc", "params",
     "everything that is not an expert"},
    {"N_shared", "L_m*n_sh*P_exp", "params", "shared experts, a copy on every card"},
    {"N_routed", "L_m*E*P_exp", "params", "routed experts, split over EP"},
    {"N_total", "N_dense + N_shared + N_routed", "params", "all parameters"},
    {"N_active", "L_m*((k + n_sh)*P_exp + P_gate) + L_d*P_ffn + P_head", "params",
     "read per token outside attention, output head included"},
    {"P_mtp", "P_mla + P_gate + 2*d^2", "params", "one MTP module without its experts"},
    {"KV_tok", "L*(kv_b + if(h_I, d_I + 4, 0)) + if(draft, kv_b, 0)", "B/token",
     "latent cache of one token over all layers; the indexer adds one FP8 key and its scale"},
    {"f_hc", "if(n_hc, 2*n_hc*d*(n_hc^2 + 3*n_hc + 2) + 2*(n_hc^2 + 2*n_hc) + i_hc*(4*n_hc^2 - 2*n_hc), 0)",
     "FLOP/token", "one mHC application: projection, maps, merge, coefficients, Sinkhorn iterations"},
    {"io_hc", "if(n_hc, (8*n_hc + 2)*d + 2*n_hc^2 + 4*n_hc - if(hc_fused, 4*n_hc*d, 0), 0)", "elements/token",
     "one mHC application's reads and writes; fusing post, residual and merge saves 4 n d"},
    {"x_flop", "if(h_I, K_I*n*(2*d_c + d_R)/(n*(2*d_c + d_R) - h_I*d_I), 0)", "tokens",
     "decode context above which selecting keys saves arithmetic"},
    {"x_bytes", "if(h_I, K_I*kv_b/(kv_b - d_I - 4), 0)", "tokens",
     "decode context above which selecting keys saves bytes"},
    {"x_prefill", "if(h_I, 2*K_I*n*(2*d_c + d_R)/(n*(d_h + d_R + d_v) - h_I*d_I), 0)", "tokens",
     "prompt length above which selecting keys saves arithmetic against causal MHA"},
    {"W_dense", "w_d*N_dense/(TP*PP)", "B", "resident weights outside the experts"},
    {"W_shared", "w_m*N_shared/PP", "B", "resident shared experts"},
    {"W_routed", "w_m*N_routed/(EP*PP)", "B", "resident routed experts"},
    {"W_mtp", "if(draft, w_d*P_mtp/TP + w_m*P_exp*(n_sh + E/EP), 0)", "B", "resident MTP module"},
    {"M_w", "W_dense + W_shared + W_routed + W_mtp", "B", "resident weights", 6},
};

// Times and totals that close every exact sheet.
const std::vector<Equation> kExactTimes = {
    {"F_total", "F_attn + F_proj + F_idx + F_ffn + F_moe + F_head + F_hc + F_mtp", "FLOP", "all arithmetic"},
    {"IO_total",
     "IO_proj + IO_idxw + IO_ffn + IO_head + IO_hcw + IO_shared + IO_routed + IO_mtp + IO_kv + IO_index"
     " + IO_kvw + IO_act",
     "B", "all bytes moved", 12},
    {"S_total", "S_ep + S_tp + S_pp + S_cp", "B", "all bytes sent", 26},
    {"remote_out", "if(EP > 1, max(0, EP - G)/(EP - 1), 0)", "",
     "share of EP peers that are outside the node"},
    {"t_attn_c", "F_attn/(C_attn*e_ac)", "s", "attention arithmetic (BF16 units unless asked otherwise)"},
    {"t_attn_m", "(IO_kv + IO_kvw + A_attn)/(BW*e_am)", "s", "attention bytes"},
    {"t_proj_c", "F_proj/(C_dense*e_g)", "s", "projections, arithmetic"},
    {"t_proj_m", "(IO_proj + A_proj)/(BW*e_m)", "s", "projections, bytes"},
    {"t_idx_c", "F_idx/(C_dense*e_g)", "s", "indexer, arithmetic"},
    {"t_idx_m", "(IO_index + IO_idxw)/(BW*e_m)", "s", "indexer, bytes"},
    {"t_ffn_c", "F_ffn/(C_dense*e_g)", "s", "dense FFN, arithmetic"},
    {"t_ffn_m", "(IO_ffn + A_ffn)/(BW*e_m)", "s", "dense FFN, bytes"},
    {"t_moe_c", "F_moe/(C_moe*e_g)", "s", "experts, arithmetic"},
    {"t_moe_m", "(IO_shared + IO_routed + A_moe)/(BW*e_m)", "s", "experts, bytes"},
    {"t_head_c", "F_head/(C_dense*e_g)", "s", "output head, arithmetic"},
    {"t_head_m", "IO_head/(BW*e_m)", "s", "output head, embedding and norms, bytes"},
    {"t_hc_c", "F_hc/(C_attn*e_g)", "s", "mHC, arithmetic"},
    {"t_hc_m", "(A_hc + IO_hcw)/(BW*e_m)", "s", "mHC, bytes"},
    {"t_mtp_c", "F_mtp/(C_moe*e_g)", "s", "MTP module, arithmetic"},
    {"t_mtp_m", "IO_mtp/(BW*e_m)", "s", "MTP module, bytes"},
    {"t_ep", "S_ep*(1 - remote_out)/(N_in*e_n) + S_ep*remote_out/(N_out*e_n)", "s",
     "expert dispatch and combine, one-way link rates"},
    {"t_tp", "S_tp/(if(TP <= G, N_in, N_out)*e_n)", "s", "tensor-parallel reduce-scatter and all-gather"},
    {"t_pp", "S_pp/(N_out*e_n)", "s", "pipeline hand-over"},
    {"t_cp", "S_cp/(if(X <= G, N_in, N_out)*e_n)", "s", "context-parallel exchange"},
    {"t_calls", "L/PP*t_launch", "s", "fixed cost of the attention calls, when measured"},
    {"t_comp", "t_attn_c + t_proj_c + t_idx_c + t_ffn_c + t_moe_c + t_head_c + t_hc_c + t_mtp_c", "s",
     "arithmetic"},
    {"t_mem", "t_attn_m + t_proj_m + t_idx_m + t_ffn_m + t_moe_m + t_head_m + t_hc_m + t_mtp_m", "s",
     "memory traffic"},
    {"t_comm", "t_ep + t_tp + t_pp + t_cp", "s", "communication"},
    {"t_serial", "t_comp + t_mem + t_comm + t_calls", "s", "nothing overlaps"},
    {"t_overlap", "max(t_comp, t_mem) + t_comm + t_calls", "s", "memory behind arithmetic"},
    {"t_ops",
     "max(t_attn_c, t_attn_m) + max(t_proj_c, t_proj_m) + max(t_idx_c, t_idx_m) + max(t_ffn_c, t_ffn_m)"
     " + max(t_moe_c, t_moe_m) + max(t_head_c, t_head_m) + max(t_hc_c, t_hc_m) + max(t_mtp_c, t_mtp_m)"
     " + t_comm + t_calls",
     "s", "memory behind arithmetic inside each operator"},
    {"t_full", "max(max(t_comp, t_mem), t_comm) + t_calls", "s", "everything overlaps"},
    {"t_peak",
     "F_attn/C_attn + (F_proj + F_idx + F_ffn + F_head)/C_dense + (F_moe + F_mtp)/C_moe + F_hc/C_attn", "s",
     "arithmetic at the full peaks; over the step time it is the MFU"},
};

// Weight traffic and communication that prefill and decode share; T is the tokens of one data-parallel rank
// in a pass, T_chunk those between two readings of the weights, passes how often the weights are read.
const std::vector<Equation> kExactTraffic = {
    {"F_ffn", "2*L_d*P_ffn*T/(X*PP)", "FLOP", "dense FFN layers"},
    {"F_moe", "2*L_m*((k*load + n_sh)*P_exp + P_gate)*T/(X*PP)", "FLOP",
     "experts and router, steady state: what a card sends out, as much comes in; load is the fullest card's "
     "share"},
    {"F_hc", "2*L*f_hc*T/(X*PP)", "FLOP", "mHC, two applications per layer"},
    {"T_group", "T_chunk*EP/X", "tokens", "tokens of the whole EP group between two readings of the experts"},
    {"touched", "if(hist, touched_hist, E/EP*(1 - (1 - k/E)^T_group))", "experts",
     "distinct local experts those tokens use, per layer"},
    {"IO_proj", "passes*w_d*L*P_mla/(TP*PP)", "B", "projection weights"},
    {"IO_idxw", "passes*w_d*L*P_idx/(TP*PP)", "B", "indexer weights"},
    {"IO_ffn", "passes*w_d*(L_d*P_ffn + L_m*P_gate)/(TP*PP)", "B", "dense FFN and router weights"},
    {"IO_head", "passes*w_d*(n_emb*P_head + P_norm)/(TP*PP)", "B", "embedding, head and norms"},
    {"IO_hcw", "passes*w_d*P_hc/(TP*PP)", "B", "mHC weights"},
    {"IO_shared", "passes*w_m*N_shared/PP", "B", "shared experts"},
    {"IO_routed", "passes*w_m*L_m*P_exp*touched/PP", "B", "routed experts that have a token"},
    {"IO_w", "IO_proj + IO_idxw + IO_ffn + IO_head + IO_hcw + IO_shared + IO_routed", "B",
     "all weight traffic"},
    {"A_ffn", "a*L_d*(2*d + 3*d_ff)*T/(X*PP)", "B", "dense FFN activations, read and written"},
    {"A_moe", "a*L_m*(k + n_sh)*(2*d + 3*d_e)*T/(X*PP)", "B", "expert activations, read and written"},
    {"A_hc", "2*2*L*io_hc*T/(X*PP)", "B", "mHC streams, BF16, two applications per layer"},
    {"S_tp", "2*(L + L_d)*T*d*2*(TP - 1)/(TP*CP*PP)", "B",
     "BF16 reduce-scatter and all-gather after attention and after each dense FFN", 28},
    {"S_pp", "2*T*d*max(1, n_hc)/X*(PP - 1)/PP", "B", "BF16 hidden states between stages, mean per card"},
};

const std::vector<Equation> kExactPrefillHead = {
    {"T", "b*s", "tokens", "new tokens of one data-parallel rank"},
    {"passes", "ceil(s/chunk)", "", "chunks, so readings of the weights"},
    {"T_chunk", "b*min(s, chunk)", "tokens", "tokens per chunk"},
    {"s'", "c + (s + 1)/2", "tokens", "mean attended length: the cached prefix and half the causal triangle"},
    {"pairs_sel",
     "b*(min(c + s, K_I)*(min(c + s, K_I) + 1)/2 - min(c, K_I)*(min(c, K_I) + 1)/2"
     " + K_I*(max(c + s, K_I) - max(c, K_I)))",
     "pairs", "query-key pairs when each query keeps at most K_I keys"},
    {"F_dense_attn", "2*L*b*s*s'*n*(d_h + d_R + d_v)/(X*PP)", "FLOP",
     "causal attention over all keys, MHA form", 2},
    {"F_sparse_attn", "2*L*pairs_sel*n*(2*d_c + d_R)/(X*PP)", "FLOP",
     "attention over the selected keys, MLA form"},
    {"F_attn", "if(h_I*(c + s > K_I), F_sparse_attn, F_dense_attn)", "FLOP", "attention"},
    {"F_proj", "2*L*(P_mla*T + b*c*d_c*n*(d_h + d_v)*if(h_I*(c + s > K_I), 0, 1))/(X*PP)", "FLOP",
     "projections, and the cached prefix expanded to keys and values"},
    {"F_idx", "if(h_I, L*(2*h_I*d_I*T*s' + 2*P_idx*T)/(X*PP), 0)", "FLOP", "indexer scores and projections"},
    {"F_head", "2*P_head*b/(X*PP)", "FLOP", "output head, last token only"},
    {"F_mtp", "0", "FLOP", "no drafting in prefill"},
};

const std::vector<Equation> kExactPrefillTail = {
    {"M_kv", "b*(c + s)*KV_tok/CP", "B", "cache of the prompts in flight", 7},
    {"M_act", "T_chunk/CP*(a*(n/TP*(2*(d_h + d_R) + 2*d_v) + 2*d + 2*(k + n_sh)*d_e) + 4*n_hc*d)", "B",
     "one layer's activations, no score matrix; mHC holds two sets of BF16 streams", 10},
    {"M_total", "M_w + M_kv + M_act + M_reserve", "B", "resident", 11},
    {"KV_seq", "(s_in + s_out)*KV_tok/CP", "B", "cache of one sequence at its end"},
    {"IO_mtp", "0", "B", "no drafting in prefill"},
    {"IO_kv", "b*(c*passes + s*(passes - 1)/2)*L*kv_b/(CP*PP)", "B",
     "cached tokens read back: the prefix and earlier chunks", 15},
    {"IO_index", "if(h_I, b*(c*passes + s*(passes + 1)/2)*L*(d_I + 4)/(CP*PP), 0)", "B", "index keys"},
    {"IO_kvw", "T*KV_tok/(CP*PP)", "B", "cache written"},
    {"A_attn", "a*L*n/TP*(2*(d_h + d_R) + 2*d_v)*T/(CP*PP)", "B",
     "q, k, v read and o written by a fused kernel"},
    {"A_proj", "a*L*(2*d + 2*d_qc + 2*d_c + d_R + n/TP*(2*(d_h + d_R) + 2*d_v))*T/(CP*PP)", "B",
     "projection inputs and outputs"},
    {"IO_act", "A_attn + A_proj + A_ffn + A_moe + A_hc", "B", "activation traffic of fused kernels", 20},
    {"S_ep", "L_m*T/(X*PP)*ranks*(EP - 1)/EP*(d*(1 + 4/128) + 2*d)", "B",
     "FP8 dispatch with scales and BF16 combine, one copy per remote rank", 27},
    {"S_cp", "if(CP > 1, L*b*(c + s)*(d_c + d_R)*2*(CP - 1)/(CP*PP), 0)", "B",
     "ring pass of the BF16 latents"},
};

const std::vector<Equation> kExactKnee = {
    {"knee", "T*(IO_w/passes)/(BW*e_m)/(t_proj_c + t_ffn_c + t_moe_c)", "tokens",
     "chunk at which reading the weights takes as long as multiplying by them"},
};

const std::vector<Equation> kExactDecodeHead = {
    {"T", "b*(1 + draft)", "tokens", "tokens of one data-parallel rank in a step"},
    {"passes", "1", "", "readings of the weights per step"},
    {"T_chunk", "T", "tokens", "tokens per reading of the weights"},
    {"s'", "s_in + s_out/2", "tokens", "mean attended length while generating"},
    {"s_sel", "if(h_I, min(s', K_I), s')", "tokens", "keys a query keeps"},
    {"F_attn", "2*L*T*s_sel*n*(2*d_c + d_R)/(X*PP)", "FLOP", "attention in the latent (MLA) form", 3},
    {"F_proj", "2*L*P_mla*T/(X*PP)", "FLOP", "projections"},
    {"F_idx", "if(h_I, L*T*(2*h_I*d_I*s' + 2*P_idx)/(X*PP), 0)", "FLOP", "indexer scores and projections"},
    {"F_head", "2*P_head*T/(X*PP)", "FLOP", "output head"},
    {"F_mtp", "draft*b/X*(2*(P_mtp + (k + n_sh)*P_exp + P_head) + 2*s'*n*(2*d_c + d_R))", "FLOP", "drafting"},
};

const std::vector<Equation> kExactDecodeTail = {
    {"KV_seq", "(s_in + s_out)*KV_tok/CP", "B", "cache of one sequence at its end"},
    {"M_kv", "b*KV_seq", "B", "cache of the batch; under TP every card holds the whole latent", 7},
    {"M_act", "T/CP*(a*(2*d + d_qc + d_c + d_R + n/TP*(2*d_c + d_R) + 2*(k + n_sh)*d_e) + 4*n_hc*d)", "B",
     "one layer's activations with the absorbed query, no score matrix", 9},
    {"M_total", "M_w + M_kv + M_act + M_reserve", "B", "resident", 11},
    {"IO_mtp", "if(draft, draft*(w_d*(P_mtp + P_head)/TP + w_m*P_exp*(n_sh + touched) + b*s'*kv_b/CP), 0)",
     "B", "drafting: module weights, its experts and its cache"},
    {"IO_kv", "b*s_sel*L*kv_b/(CP*PP)", "B", "cache read, once per sequence", 15},
    {"IO_index", "if(h_I, b*s'*L*(d_I + 4)/(CP*PP), 0)", "B", "index keys read"},
    {"IO_kvw", "T*KV_tok/(CP*PP)", "B", "cache written"},
    {"A_attn", "a*L*n/TP*(2*d_c + d_R)*T/(CP*PP)", "B", "absorbed q read and latent o written"},
    {"A_proj", "a*L*(2*d + 2*d_qc + d_c + d_R + n/TP*(2*d_h + d_R + 2*d_c + 2*d_v))*T/(CP*PP)", "B",
     "projection inputs and outputs"},
    {"IO_act", "A_attn + A_proj + A_ffn + A_moe + A_hc", "B", "activation traffic of fused kernels", 25},
    {"S_ep", "L_m*T/(X*PP)*k*(EP - 1)/EP*(d*(1 + 4/128) + 2*d)", "B",
     "FP8 dispatch with scales and BF16 combine, one copy per remote expert", 27},
    {"S_cp", "if(CP > 1, L*T*n/TP*(d_c + 1)*4*(CP - 1)/(CP*PP), 0)", "B", "fp32 partial results merged"},
};

// The article. Its weights count in 1e9 bytes, everything else in GiB, and the two are added as they are.
const std::vector<Equation> kArticlePrefill = {
    {"GiB", "1024^3", "B", "the article's GB"},
    {"s'", "s/2", "tokens", "causal mean"},
    {"F_nonattn", "2*P_act*b*s", "FLOP", "arithmetic outside attention (no projections)", 1},
    {"F_mha", "L*2*b*s'*n*(2*d_h + d_R)*s", "FLOP", "causal attention, MHA form", 2},
    {"F_prefill", "F_nonattn + F_mha", "FLOP", "prefill arithmetic", 4},
    {"F_card", "F_nonattn/EP + F_mha/TP", "FLOP", "per card: experts over EP, attention over TP"},
    {"M_w", "(w_d*G_dense/TP + w_m*G_moe/EP)/10^9", "GB", "resident weights", 6},
    {"M_kv", "b*s*L*kv_b/GiB", "GiB", "cache of the prompts; the printed formula leaves L out", 7},
    {"M_act", "a*(5*b*s*d + 2*b*n*s*s + 2*b*s*k_all*d_e + b*s*d)/GiB", "GiB",
     "one layer's activations, unfused", 10},
    {"M_total", "M_w + M_kv + M_act + M_reserve/10^9", "GB", "resident, mixed units", 11},
    {"IO_w", "(w_d*G_dense/TP + w_m*G_moe/(E + 1)*k_all)/10^9", "GB", "weights read", 13},
    {"IO_kv", "L*b*s*kv_b/GiB", "GiB", "cache written", 15},
    {"M_linear", "a*L*5*b*s*d/GiB", "GiB", "projection activations", 17},
    {"M_score", "a*L*2*b*n*s^2/GiB", "GiB", "score matrix", 18},
    {"M_ffn", "a*L*(2*b*s*k_all*d_e + b*s*d)/GiB", "GiB", "FFN activations", 19},
    {"IO_act", "(M_linear + M_score + M_ffn)*2", "GiB", "activations read and written", 20},
    {"IO_total", "IO_w + IO_kv + IO_act", "GB", "bytes moved, mixed units", 12},
    {"T_ep", "if(EP > 1, L_m*2*b*s*d*(k_all - 1)*2/GiB, 0)", "GiB",
     "dispatch and combine of one BF16 copy per expert, all remote", 27},
    {"T_tp", "L*2*b*s*d*2*(TP - 1)/TP/GiB", "GiB", "one reduce-scatter and all-gather per layer", 28},
    {"T_total", "T_ep + T_tp", "GiB", "bytes sent", 26},
    {"t_comp", "F_card/C_moe", "s", "arithmetic at the FP8 peak, attention too"},
    {"t_mem", "IO_total/(BW/10^9)", "s", "memory traffic"},
    {"share_out", "if(EP > G, 1 - G/EP, 0)", "", "share of EP traffic that leaves the node"},
    {"t_comm", "(T_ep*(1 - share_out) + T_tp)/(N_in/10^9) + T_ep*share_out/(N_out/10^9)", "s",
     "communication at the both-directions NVLink rate"},
    {"knee", "b*s*IO_w/(BW/10^9)/(F_nonattn/EP/C_moe)", "tokens",
     "chunk at which reading the weights takes as long as multiplying by them"},
};

const std::vector<Equation> kArticleDecode = {
    {"GiB", "1024^3", "B", "the article's GB"},
    {"s'", "s_in + s_out/2", "tokens", "mean attended length"},
    {"F_nonattn", "2*P_act*b", "FLOP", "arithmetic outside attention (no projections)", 1},
    {"F_mla", "L*2*b*s'*n*(2*d_c + d_R)", "FLOP", "attention, MLA form", 3},
    {"F_decode", "F_nonattn + F_mla", "FLOP", "decode arithmetic", 5},
    {"F_card", "F_nonattn/EP + F_mla/TP", "FLOP",
     "per card: the card's own tokens over EP, attention over TP"},
    {"M_w", "(w_d*G_dense/TP + w_m*G_moe/EP)/10^9", "GB", "resident weights", 6},
    {"M_kv", "b*(s_in + s_out)*L*kv_b/GiB", "GiB", "cache; the printed formula leaves L out", 7},
    {"M_act", "a*b*(d_qc + (d_c + d_R) + d + 2*n*s' + 2*k_all*d_e + d)/GiB", "GiB", "one layer's activations",
     9},
    {"M_total", "M_w + M_kv + M_act + M_reserve/10^9", "GB", "resident, mixed units", 11},
    {"k_io", "1 + (k_all - 1)/EP", "experts", "experts read per layer, mean"},
    {"IO_w", "(w_d*G_dense/TP + w_m*G_moe/(E + 1)*k_io)/10^9", "GB", "weights read", 14},
    {"IO_kv", "L*b*s_in*kv_b/GiB", "GiB", "cache read (the prompt's part only)", 15},
    {"M_linear", "a*L*b*(d_qc + (d_c + d_R) + d)/GiB", "GiB", "projection activations", 22},
    {"M_score", "a*L*2*b*n*s'/GiB", "GiB", "scores", 23},
    {"M_ffn", "a*L*(2*b*k_all*d_e + b*d)/GiB", "GiB", "FFN activations", 24},
    {"IO_act", "(M_linear + M_score + M_ffn)*2", "GiB", "activations read and written", 25},
    {"IO_total", "IO_w + IO_kv + IO_act", "GB", "bytes moved, mixed units", 12},
    {"T_ep", "if(EP > 1, L_m*2*b*d*(k_all - 1)*2/GiB, 0)", "GiB",
     "dispatch and combine of one BF16 copy per expert, all remote", 27},
    {"T_tp", "L*2*b*d*2*(TP - 1)/TP/GiB", "GiB", "one reduce-scatter and all-gather per layer", 28},
    {"T_total", "T_ep + T_tp", "GiB", "bytes sent", 26},
    {"t_comp", "F_card/10^9/1024/(C_moe/10^12)", "s",
     "arithmetic at the FP8 peak, 1 TFLOP taken as 1024 GFLOP"},
    {"t_mem", "IO_total/(BW/10^9)", "s", "memory traffic"},
    {"share_out", "if(EP > G, 1 - G/EP, 0)", "", "share of EP traffic that leaves the node"},
    {"t_comm", "(T_ep*(1 - share_out) + T_tp)/(N_in/10^9) + T_ep*share_out/(N_out/10^9)", "s",
     "communication at the both-directions NVLink rate"},
};

// What the article's sheets need besides the 28 formulas.
const std::vector<Equation> kArticleHead = {
    {"k_all", "k + n_sh", "experts", "experts per token, shared included"}};
const std::vector<Equation> kArticleTail = {
    {"t_serial", "t_comp + t_mem + t_comm", "s", "nothing overlaps"},
    {"t_overlap", "max(t_comp, t_mem) + t_comm", "s", "memory behind arithmetic"},
    {"t_full", "max(max(t_comp, t_mem), t_comm)", "s", "everything overlaps"},
    {"KV_seq", "(s_in + s_out)*L*kv_b", "B", "cache of one sequence at its end"},
};

Sheet build(std::initializer_list<const std::vector<Equation>*> parts) {
  std::vector<Equation> all;
  for (const auto* part : parts) all.insert(all.end(), part->begin(), part->end());
  return Sheet(inputs(), std::move(all));
}

}  // namespace

const Sheet& sheet(Mode mode, PhaseKind phase) {
  static const Sheet article_prefill = build({&kArticleHead, &kArticlePrefill, &kArticleTail});
  static const Sheet article_decode = build({&kArticleHead, &kArticleDecode, &kArticleTail});
  static const Sheet exact_prefill = build(
      {&kParameters, &kExactPrefillHead, &kExactTraffic, &kExactPrefillTail, &kExactTimes, &kExactKnee});
  static const Sheet exact_decode =
      build({&kParameters, &kExactDecodeHead, &kExactTraffic, &kExactDecodeTail, &kExactTimes});
  if (mode == Mode::kArticle) return phase == PhaseKind::kPrefill ? article_prefill : article_decode;
  return phase == PhaseKind::kPrefill ? exact_prefill : exact_decode;
}

}  // namespace flash_mla::planner
