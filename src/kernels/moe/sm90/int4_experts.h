#pragma once

// The routed experts' two products in W4A8: how a step's rows and memory become the arguments of their kernels.

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/int4_gemm.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/quant/sm90/quantise_rows.h"

namespace flash_mla::sm90 {

struct Int4ExpertMemory {
  const ExpertUnit* units = nullptr;
  const std::int32_t *num_units = nullptr, *pairs = nullptr;
  /// (tokens, hidden) and (pairs, intermediate), rows rounded up to 128.
  void *x_codes = nullptr, *act_codes = nullptr;
  void* results = nullptr;  ///< (pairs, hidden) bfloat16
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

inline Int4Experts int4_experts(const ExpertFfn& p, const Int4ExpertMemory& memory, double mean_pairs) {
  Int4Gemm g;
  g.m = p.tokens * p.experts_per_token;
  g.experts = p.num_experts;
  g.units = memory.units;
  g.num_units = memory.num_units;
  g.pairs = memory.pairs;
  g.rows_per_unit = int4_rows_per_unit(mean_pairs);
  g.max_units = g.m / g.rows_per_unit + (g.m < p.num_experts ? g.m : p.num_experts);
  g.programmatic_launch = p.programmatic_launch;
  Int4Experts out;
  out.gate_up = out.down = g;

  out.quantise.x = p.x;
  out.quantise.x_stride = p.x_stride;
  out.quantise.codes = memory.x_codes;
  out.quantise.scales = memory.x_scales;
  out.quantise.offsets = memory.x_offsets;
  out.quantise.rows = p.tokens;
  out.quantise.columns = p.hidden;
  out.quantise.programmatic_launch = p.programmatic_launch;

  out.gate_up.x = memory.x_codes;
  out.gate_up.x_scales = memory.x_scales;
  out.gate_up.x_offsets = memory.x_offsets;
  out.gate_up.x_rows = p.tokens;
  out.gate_up.x_divisor = p.experts_per_token;
  out.gate_up.gather = out.gate_up.silu_quantise = true;
  out.gate_up.weight = p.gate_up;
  out.gate_up.weight_scales = p.gate_up_scales;
  out.gate_up.n = 2 * p.intermediate;
  out.gate_up.k = p.hidden;
  out.gate_up.out = memory.act_codes;
  out.gate_up.out_scales = memory.act_scales;
  out.gate_up.out_offsets = memory.act_offsets;

  out.down.x = memory.act_codes;
  out.down.x_scales = memory.act_scales;
  out.down.x_offsets = memory.act_offsets;
  out.down.x_rows = g.m;
  out.down.weight = p.down;
  out.down.weight_scales = p.down_scales;
  out.down.n = out.down.out_stride = p.hidden;
  out.down.k = p.intermediate;
  out.down.out = memory.results;
  out.down.scatter = true;
  return out;
}

/// Whether the products are made so.
inline bool takes_w4a8(const ExpertFfn& p, const Int4Experts& products, double mean_pairs) {
  return p.int4 && !p.batch_invariant && p.tokens > 1 && mean_pairs >= p.fp8_rows && p.x_stride % 8 == 0 &&
         fits_int4_gemm(products.gate_up) && fits_int4_gemm(products.down);
}

}  // namespace flash_mla::sm90
