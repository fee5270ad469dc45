#pragma once

// How a dense decode call is cut and launched, as a function of its shape. The launcher does what this says
// and `flash-mla bench --explain` prints it. Free of CUDA, so that both can be had without a GPU.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "flash_mla/schedule.h"
#include "kernels/attention/dense_decode/sm90/combine_shape.h"
#include "kernels/attention/dense_decode/sm90/params.h"

namespace flash_mla::sm90 {

static_assert(kTileTokens == ScheduleOptions{}.block_size, "a tile of the kernel is a block of the schedule");

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
  std::size_t combine_smem;  ///< bytes at least for a block, so that they spread over all multiprocessors
};

/// Parts a schedule should have: one per group of CTAs, those of all row blocks and latent heads, that `sms`
/// multiprocessors run at a time.
constexpr int num_parts(int sms, const RowBlocks& blocks, int h_kv) {
  return std::max(sms / h_kv / blocks.count(), 1);
}

/// How a schedule should cut a batch.
///
/// `batch` 0: not known, as if it were large. num_parts does not depend on it: FlashMLA's callers copy the
/// metadata of one batch over another's. Measured (docs/kernels/dense-decode-sm90.md):
/// - What starting a request costs, in tiles: 4 is best for varying lengths, by 1 to 2.5% over 8. Where
///   every request is cut anyway, 0, by 2 to 7% over 2.
/// - 128 equal requests are 3% more work for the busiest part when left whole, and yet 2 to 6% faster.
/// - Clusters take tiles in pairs and are slow with one: b=1, s_k=4096 takes 19 us in parts of two tiles,
///   23 in parts of one.
constexpr ScheduleOptions schedule_options(int batch, int sms, const RowBlocks& blocks, int h_kv) {
  ScheduleOptions options;
  options.num_parts = num_parts(sms, blocks, h_kv);
  if (batch == 0 || 2 * std::int64_t{batch} > options.num_parts) {
    options.fixed_overhead_blocks = 4;
    options.whole_requests_percent = 5;
  } else {
    options.fixed_overhead_blocks = 0;
    options.min_blocks_per_part = blocks.count() % 2 == 0 ? 2 : 1;
  }
  return options;
}

/// Does the tensor unit or the memory take longer over a tile of keys? A row block costs an SM 2176 clocks;
/// at 4.65 TB/s a tile of 72 KiB for each of 132 SMs arrives in 3660.
constexpr bool compute_bound(const RowBlocks& blocks) { return blocks.count() * 2176 > 3660; }

constexpr std::size_t kSmemPerSm = std::size_t{228} * 1024;  ///< of sm_90, of which each block takes
constexpr std::size_t kSmemReserved = 1024;                  ///< so much more than it asks for
constexpr std::size_t kSmemUnit = 128;                       ///< what shared memory is given in
constexpr std::size_t kMaxSmem = kSmemPerSm - kSmemReserved;

constexpr DecodePlan plan_decode(int batch, int sms, const RowBlocks& blocks, int h_kv, int num_parts,
                                 bool fixed_splits) {
  DecodePlan plan{};
  plan.blocks = blocks;
  plan.cluster = blocks.count() % 2 == 0 ? 2 : 1;
  plan.grid = {blocks.count(), h_kv, num_parts};
  plan.combines = num_parts > 1 || fixed_splits;
  // A block per request or per part, whichever are fewer: at most one split request begins in a part.
  const std::int64_t owners = fixed_splits ? batch : std::min(batch, num_parts);
  const std::int64_t row_groups_of_all = combine_row_groups(blocks, h_kv);
  // The finest shape whose blocks run at once, one to a multiprocessor; the coarsest if there is none.
  plan.combine = fixed_splits ? kFixedCombineShape : kCombineShapes.back();
  for (std::size_t i = kCombineShapes.size(); i-- > 0 && !fixed_splits;) {
    if (kCombineShapes[i].chunks() * row_groups_of_all * owners <= sms) plan.combine = kCombineShapes[i];
  }
  plan.combine_grid = {plan.combine.chunks(), row_groups_of_all, owners};
  const std::int64_t count = plan.combine_grid.x * plan.combine_grid.y * plan.combine_grid.z;
  const auto per_sm = static_cast<std::size_t>(std::max<std::int64_t>((count + sms - 1) / sms, 1));
  plan.combine_smem = std::max(kSmemPerSm / per_sm / kSmemUnit * kSmemUnit, kSmemReserved) - kSmemReserved;
  return plan;
}

}  // namespace flash_mla::sm90
