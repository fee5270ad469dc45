#pragma once

// The routed experts' two products by narrow weights, in W4A8, W4A16 or W8A16: how a step's rows and memory become the arguments
// of their kernels.

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/sm90/narrow_gemm.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/quant/sm90/quantise_rows.h"

namespace flash_mla::sm90 {

struct NarrowExpertMemory {
  const ExpertUnit* units = nullptr;
  const std::int32_t *num_units = nullptr, *pairs = nullptr;
  /// W4A8: (tokens, hidden) and (pairs, intermediate) codes, rows rounded up to 128; else the latter in bfloat16.
  void *x_codes = nullptr, *act = nullptr;
  void* results = nullptr;  ///< (pairs, hidden) bfloat16 of W4A8, else float32
  float *x_scales = nullptr, *x_offsets = nullptr, *act_scales = nullptr, *act_offsets = nullptr;
};

struct NarrowExperts {
  QuantiseRows quantise;
  NarrowGemm gate_up, down;
};

/// Rows of a tile: the least that few experts have more pairs than, if pairs are evenly spread. More are read again, though
/// from L2.
constexpr int narrow_rows_per_unit(double mean_pairs) {
  return mean_pairs <= 9 ? 16 : mean_pairs <= 22 ? 32 : mean_pairs <= 50 ? 64 : 128;
}

/// What both products have in common.
inline NarrowGemm narrow_product(const ExpertFfn& p, const NarrowExpertMemory& memory, double mean_pairs) {
  NarrowGemm g;
  g.m = p.tokens * p.experts_per_token;
  g.experts = p.num_experts;
  g.units = memory.units;
  g.num_units = memory.num_units;
  g.pairs = memory.pairs;
  g.rows_per_unit = narrow_rows_per_unit(mean_pairs);
  g.max_units = g.m / g.rows_per_unit + (g.m < p.num_experts ? g.m : p.num_experts);
  g.programmatic_launch = p.programmatic_launch;
  return g;
}
inline NarrowGemm narrow_gate_up(const ExpertFfn& p, NarrowGemm g) {
  g.x_rows = p.tokens;
  g.x_divisor = p.experts_per_token;
  g.gather = g.silu = true;
  g.weight = p.gate_up;
  g.weight_scales = p.gate_up_scales;
  g.n = 2 * p.intermediate;
  g.k = p.hidden;
  return g;
}
inline NarrowGemm narrow_down(const ExpertFfn& p, NarrowGemm g) {
  g.x_rows = g.m;
  g.weight = p.down;
  g.weight_scales = p.down_scales;
  g.n = g.out_stride = p.hidden;
  g.k = p.intermediate;
  g.scatter = true;
  return g;
}

inline NarrowExperts w4a8_experts(const ExpertFfn& p, const NarrowExpertMemory& memory, double mean_pairs) {
  const NarrowGemm g = narrow_product(p, memory, mean_pairs);
  NarrowExperts out;
  out.quantise.x = p.x;
  out.quantise.x_stride = p.x_stride;
  out.quantise.codes = memory.x_codes;
  out.quantise.scales = memory.x_scales;
  out.quantise.offsets = memory.x_offsets;
  out.quantise.rows = p.tokens;
  out.quantise.columns = p.hidden;
  out.quantise.programmatic_launch = p.programmatic_launch;

  out.gate_up = narrow_gate_up(p, g);
  out.gate_up.x = memory.x_codes;
  out.gate_up.x_scales = memory.x_scales;
  out.gate_up.x_offsets = memory.x_offsets;
  out.gate_up.out = memory.act;
  out.gate_up.out_scales = memory.act_scales;
  out.gate_up.out_offsets = memory.act_offsets;

  out.down = narrow_down(p, g);
  out.down.x = memory.act;
  out.down.x_scales = memory.act_scales;
  out.down.x_offsets = memory.act_offsets;
  out.down.out = memory.results;
  return out;
}

/// Activations in bfloat16: without `quantise`.
inline NarrowExperts exact_experts(const ExpertFfn& p, const NarrowExpertMemory& memory, double mean_pairs) {
  NarrowGemm g = narrow_product(p, memory, mean_pairs);
  g.bf16 = true;
  g.e4m3 = !p.int4;
  NarrowExperts out;
  out.gate_up = narrow_gate_up(p, g);
  out.gate_up.x = p.x;
  out.gate_up.x_stride = p.x_stride;
  out.gate_up.scatter = true;
  out.gate_up.out = memory.act;
  out.gate_up.out_stride = p.intermediate;

  out.down = narrow_down(p, g);
  out.down.x = memory.act;
  out.down.x_stride = p.intermediate;
  out.down.gather = true;
  out.down.out = memory.results;
  out.down.out_fp32 = true;
  return out;
}

/// Pairs of an expert, on average, above which rounded tiles of 128 pairs are quicker than exact products of fewer.
inline constexpr double kMostExactPairs = 50;

/// Whether the products are made so.
inline bool takes_exact(const ExpertFfn& p, const NarrowExperts& products, double mean_pairs) {
  return p.gate_up_scales != nullptr && !p.batch_invariant && p.tokens > 1 && mean_pairs <= kMostExactPairs &&
         fits_narrow_gemm(products.gate_up) && fits_narrow_gemm(products.down);
}
inline bool takes_w4a8(const ExpertFfn& p, const NarrowExperts& products, double mean_pairs) {
  return p.int4 && !p.batch_invariant && p.tokens > 1 && mean_pairs >= p.fp8_rows && p.x_stride % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0 && fits_narrow_gemm(products.gate_up) &&
         fits_narrow_gemm(products.down);
}

}  // namespace flash_mla::sm90
