#pragma once

// How a dense decode call is cut and launched, as a function of its shape. The launcher does what this says
// and `flash-mla bench --explain` prints it. Free of CUDA, so that both can be had without a GPU.

#include <algorithm>
#include <cstdint>

#include "sm90/decode/combine_shape.h"
#include "sm90/decode/params.h"

namespace flash_mla::sm90 {

struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
};

struct DecodePlan {
  RowBlocks blocks;  ///< of one latent head
  int cluster;       ///< CTAs, of as many row blocks, that share every tile of keys
  Grid grid;         ///< (row blocks, latent heads, parts)
  bool combines;     ///< a combine kernel follows
  CombineShape combine;
  Grid combine_grid;
};

/// Parts a schedule should have: one per group of CTAs, those of all row blocks and latent heads, that `sms`
/// multiprocessors run at a time.
constexpr int num_parts(int sms, const RowBlocks& blocks, int h_kv) {
  return std::max(sms / h_kv / blocks.count(), 1);
}

/// How a schedule should cut a batch: see ScheduleOptions.
struct ScheduleShape {
  int num_parts, fixed_overhead_blocks, min_blocks_per_part, whole_requests_percent;
};

/// `batch` 0: not known, as if it were large. Measured (docs/kernels/dense-decode-sm90.md):
/// - What starting a request costs, in tiles: 4 is best for varying lengths, by 1 to 2.5% over 8. Where
///   every request is cut anyway, 0, by 2 to 7% over 2.
/// - 128 equal requests are 3% more work for the busiest part when left whole, and yet 2 to 6% faster.
/// - Clusters take tiles in pairs and are slow with one: b=1, s_k=4096 takes 19 us in parts of two tiles,
///   23 in parts of one.
/// - A single request's partial results are combined by blocks that start while the decode kernel still
///   runs, if it leaves them room: b=1, h_q=16, s_k=32768 takes 27 us on 110 multiprocessors, 33 on all.
///   Where work is compute-bound, or more requests make more blocks, it loses more than that.
constexpr ScheduleShape schedule_shape(int batch, int sms, const RowBlocks& blocks, int h_kv) {
  const int parts = num_parts(sms, blocks, h_kv);
  const bool single = batch == 1 && h_kv == 1 && blocks.count() == 1;
  if (batch == 0 || 2 * std::int64_t{batch} > parts) return {parts, 4, 1, 5};
  return {single ? std::max(parts * 5 / 6, 1) : parts, 0, blocks.count() % 2 == 0 ? 2 : 1, 0};
}

/// Does the tensor unit or the memory take longer over a tile of keys? A row block costs an SM 2176 clocks;
/// at 4.65 TB/s a tile of 72 KiB for each of 132 SMs arrives in 3660.
constexpr bool compute_bound(const RowBlocks& blocks) { return blocks.count() * 2176 > 3660; }

constexpr DecodePlan plan_decode(int batch, const RowBlocks& blocks, int h_kv, int num_parts,
                                 bool fixed_splits) {
  DecodePlan plan{};
  plan.blocks = blocks;
  plan.cluster = blocks.count() % 2 == 0 ? 2 : 1;
  plan.grid = {blocks.count(), h_kv, num_parts};
  plan.combines = num_parts > 1 || fixed_splits;
  // A block per request or per part, whichever are fewer: at most one split request begins in a part.
  const std::int64_t owners = fixed_splits ? batch : std::min(batch, num_parts);
  const std::int64_t row_groups_of_all = combine_row_groups(blocks, h_kv);
  // The finest shape of at most kBlocks blocks; with fixed split points always the same, since the order of
  // summation must not depend on the rest of the batch.
  constexpr int kBlocks = 512;
  const auto blocks_of = [&](CombineShape shape) {
    return column_chunks(shape) * row_groups_of_all * owners;
  };
  plan.combine = CombineShape::kMedium;
  if (!fixed_splits && blocks_of(CombineShape::kFine) <= kBlocks) plan.combine = CombineShape::kFine;
  if (!fixed_splits && blocks_of(CombineShape::kMedium) > kBlocks) plan.combine = CombineShape::kCoarse;
  plan.combine_grid = {column_chunks(plan.combine), row_groups_of_all, owners};
  return plan;
}

}  // namespace flash_mla::sm90
