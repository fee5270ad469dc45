#pragma once

// The routed experts' two products by int4 weights, in W4A8 or W4A16: how a step's rows and memory become the arguments of
// their kernels.

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/int4_gemm.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/quant/sm90/quantise_rows.h"

namespace flash_mla::sm90 {

struct Int4ExpertMemory {
  const ExpertUnit* units = nullptr;
  const std::int32_t *num_units = nullptr, *pairs = nullptr;
  /// W4A8: (tokens, hidden) and (pairs, intermediate) codes, rows rounded up to 128; W4A16: the latter in bfloat16.
  void *x_codes = nullptr, *act = nullptr;
  void* results = nullptr;  ///< (pairs, hidden) bfloat16, W4A16: float32
  float *x_scales = nullptr, *x_offsets = nullptr, *act_scales = nullptr, *act_offsets = nullptr;
};

struct Int4Experts {
  QuantiseRows quantise;
  Int4Gemm gate_up, down;
};

/// Rows of a tile: the least that few experts have more pairs than, if pairs are evenly spread. More are read again, though
/// from L2.
constexpr int int4_rows_per_unit(double mean_pairs) {
  return mean_pairs <= 9 ? 16 : mean_pairs <= 22 ? 32 : mean_pairs <= 50 ? 64 : 128;
}

/// What both products have in common.
inline Int4Gemm int4_product(const ExpertFfn& p, const Int4ExpertMemory& memory, double mean_pairs) {
  Int4Gemm g;
  g.m = p.tokens * p.experts_per_token;
  g.experts = p.num_experts;
  g.units = memory.units;
  g.num_units = memory.num_units;
  g.pairs = memory.pairs;
  g.rows_per_unit = int4_rows_per_unit(mean_pairs);
  g.max_units = g.m / g.rows_per_unit + (g.m < p.num_experts ? g.m : p.num_experts);
  g.programmatic_launch = p.programmatic_launch;
  return g;
}
inline Int4Gemm int4_gate_up(const ExpertFfn& p, Int4Gemm g) {
  g.x_rows = p.tokens;
  g.x_divisor = p.experts_per_token;
  g.gather = g.silu = true;
  g.weight = p.gate_up;
  g.weight_scales = p.gate_up_scales;
  g.n = 2 * p.intermediate;
  g.k = p.hidden;
  return g;
}
inline Int4Gemm int4_down(const ExpertFfn& p, Int4Gemm g) {
  g.x_rows = g.m;
  g.weight = p.down;
  g.weight_scales = p.down_scales;
  g.n = g.out_stride = p.hidden;
  g.k = p.intermediate;
  g.scatter = true;
  return g;
}

inline Int4Experts w4a8_experts(const ExpertFfn& p, const Int4ExpertMemory& memory, double mean_pairs) {
  const Int4Gemm g = int4_product(p, memory, mean_pairs);
  Int4Experts out;
  out.quantise.x = p.x;
  out.quantise.x_stride = p.x_stride;
  out.quantise.codes = memory.x_codes;
  out.quantise.scales = memory.x_scales;
  out.quantise.offsets = memory.x_offsets;
  out.quantise.rows = p.tokens;
  out.quantise.columns = p.hidden;
  out.quantise.programmatic_launch = p.programmatic_launch;

  out.gate_up = int4_gate_up(p, g);
  out.gate_up.x = memory.x_codes;
  out.gate_up.x_scales = memory.x_scales;
  out.gate_up.x_offsets = memory.x_offsets;
  out.gate_up.out = memory.act;
  out.gate_up.out_scales = memory.act_scales;
  out.gate_up.out_offsets = memory.act_offsets;

  out.down = int4_down(p, g);
  out.down.x = memory.act;
  out.down.x_scales = memory.act_scales;
  out.down.x_offsets = memory.act_offsets;
  out.down.out = memory.results;
  return out;
}

/// Without `quantise`.
inline Int4Experts w4a16_experts(const ExpertFfn& p, const Int4ExpertMemory& memory, double mean_pairs) {
  Int4Gemm g = int4_product(p, memory, mean_pairs);
  g.bf16 = true;
  Int4Experts out;
  out.gate_up = int4_gate_up(p, g);
  out.gate_up.x = p.x;
  out.gate_up.x_stride = p.x_stride;
  out.gate_up.scatter = true;
  out.gate_up.out = memory.act;
  out.gate_up.out_stride = p.intermediate;

  out.down = int4_down(p, g);
  out.down.x = memory.act;
  out.down.x_stride = p.intermediate;
  out.down.gather = true;
  out.down.out = memory.results;
  out.down.out_fp32 = true;
  return out;
}

/// Pairs of an expert, on average, above which rounded tiles of 128 pairs are quicker than exact products of fewer.
inline constexpr double kMostW4A16Pairs = 50;

/// Whether the products are made so.
inline bool takes_w4a16(const ExpertFfn& p, const Int4Experts& products, double mean_pairs) {
  return p.int4 && !p.batch_invariant && p.tokens > 1 && mean_pairs <= kMostW4A16Pairs &&
         fits_int4_gemm(products.gate_up) && fits_int4_gemm(products.down);
}
inline bool takes_w4a8(const ExpertFfn& p, const Int4Experts& products, double mean_pairs) {
  return p.int4 && !p.batch_invariant && p.tokens > 1 && mean_pairs >= p.fp8_rows && p.x_stride % 8 == 0 &&
         fits_int4_gemm(products.gate_up) && fits_int4_gemm(products.down);
}

}  // namespace flash_mla::sm90
