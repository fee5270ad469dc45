#pragma once

// The routed experts' two products in FP8: how a step's rows and memory become the arguments of their kernels.

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/fp8_gemm.h"
#include "kernels/gemm/sm90/grouped_gemm.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/quant/sm90/quantise_rows.h"

namespace flash_mla::sm90 {

/// Pairs of an expert, on average.
inline double mean_pairs(const ExpertFfn& p) {
  return static_cast<double>(p.tokens * p.experts_per_token) /
         (p.of_experts > 0 ? p.of_experts : p.num_experts);
}

struct Fp8ExpertMemory {
  const ExpertUnit* units = nullptr;
  const std::int32_t *num_units = nullptr, *pairs = nullptr;
  void *x_codes = nullptr, *act_codes = nullptr;  ///< (tokens, hidden), (pairs, intermediate)
  void* results = nullptr;                        ///< (pairs, hidden) bfloat16
  float *x_scales = nullptr, *act_scales = nullptr;
};

struct Fp8Experts {
  QuantiseRows quantise;
  Fp8Gemm gate_up, down;
};

inline Fp8Experts fp8_experts(const ExpertFfn& p, const Fp8ExpertMemory& memory, int num_sms) {
  Fp8Gemm g;
  g.whole_blocks = p.whole_blocks;
  g.m = p.tokens * p.experts_per_token;
  g.experts = p.num_experts;
  g.units = memory.units;
  g.num_units = memory.num_units;
  g.pairs = memory.pairs;
  g.programmatic_launch = p.programmatic_launch;
  g.tiles = plan_fp8_gemm(static_cast<std::int64_t>(mean_pairs(p)), p.hidden, p.num_experts, true, num_sms);
  Fp8Experts out;
  g.max_units = g.m / kGroupedRows + (g.m < p.num_experts ? g.m : p.num_experts);
  out.gate_up = out.down = g;
  out.quantise.x = p.x;
  out.quantise.x_stride = p.x_stride;
  out.quantise.codes = memory.x_codes;
  out.quantise.scales = memory.x_scales;
  out.quantise.rows = p.tokens;
  out.quantise.columns = p.hidden;
  out.quantise.programmatic_launch = p.programmatic_launch;

  out.gate_up.x = memory.x_codes;
  out.gate_up.x_stride = out.gate_up.k = p.hidden;
  out.gate_up.x_scales = memory.x_scales;
  out.gate_up.x_rows = p.tokens;
  out.gate_up.x_divisor = p.experts_per_token;
  out.gate_up.gather = out.gate_up.silu_quantise = true;
  out.gate_up.weight = p.gate_up;
  out.gate_up.weight_scales = p.gate_up_scales;
  out.gate_up.n = 2 * p.intermediate;
  out.gate_up.out = memory.act_codes;
  out.gate_up.out_scales = memory.act_scales;

  out.down.x = memory.act_codes;
  out.down.x_stride = out.down.k = p.intermediate;
  out.down.x_scales = memory.act_scales;
  out.down.x_rows = g.m;
  out.down.weight = p.down;
  out.down.weight_scales = p.down_scales;
  out.down.n = out.down.out_stride = p.hidden;
  out.down.out = memory.results;
  out.down.scatter = true;
  return out;
}

/// Whether the products are made in FP8.
inline bool takes_fp8(const ExpertFfn& p, const Fp8Experts& products) {
  return p.gate_up_scales != nullptr && !p.int4 && !p.batch_invariant && p.tokens > 1 &&
         mean_pairs(p) >= p.fp8_rows && p.x_stride % 8 == 0 && fits_fp8_gemm(products.gate_up) &&
         fits_fp8_gemm(products.down);
}

}  // namespace flash_mla::sm90
