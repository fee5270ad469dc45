#pragma once

// The plan of requests that are all of one length: a function, not a table. For the host and for kernels alike.

#include <cstdint>
#include <numeric>

#include "flash_mla/schedule.h"
#include "schedule/walk.h"

namespace flash_mla {

/// All requests' blocks lie on a line; part i works on blocks [i * step, (i + 1) * step) of it.
struct UniformPlan {
  std::int32_t blocks = 0;  ///< of a request; 0: there is no such plan
  std::int32_t step = 0;    ///< blocks of a part
  std::int32_t common = 0;  ///< of `blocks` and `step` the least common multiple: cuts where a request ends

  constexpr PartRange part(std::int32_t index, std::int32_t batch) const {
    const std::int32_t total = batch * blocks, begin = index * step;
    if (begin >= total) return {batch, batch - 1, 0, 0};
    const std::int32_t last = least<std::int32_t>(begin + step, total) - 1;
    return {begin / blocks, last / blocks, begin % blocks, last % blocks + 1};
  }
  /// Number of the split of `part.begin_req` with which the part begins.
  constexpr std::int32_t begin_split(const PartRange& part) const {
    return part.begin_block > 0 ? (part.begin_block - 1) / step + 1 : 0;
  }
  /// Splits of all requests before `req`.
  constexpr std::int32_t splits_before(std::int32_t req) const {
    const std::int32_t last = req * blocks - 1;
    return req == 0 ? 0 : req + last / step - last / common;
  }
};

/// No plan for requests without blocks, for fixed split points, or for 2^30 blocks and more.
inline UniformPlan uniform_plan(std::int64_t batch, std::int64_t blocks, const ScheduleOptions& options) {
  const std::int64_t total = batch * blocks, parts = options.num_parts;
  if (total == 0 || options.fixed_split_blocks > 0 || total >= 1 << 30) return {};
  const std::int64_t each = (batch + parts - 1) / parts;
  const bool whole =
      options.whole_requests_percent > 0 &&
      each * blocks * parts * 100 <= total * (100 + std::int64_t{options.whole_requests_percent});
  std::int64_t step = (total + parts - 1) / parts;
  if (step < options.min_blocks_per_part)
    step = options.min_blocks_per_part < total ? options.min_blocks_per_part : total;
  if (whole) step = each * blocks;
  const std::int64_t common = std::lcm(step, blocks);
  return {static_cast<std::int32_t>(blocks), static_cast<std::int32_t>(step),
          static_cast<std::int32_t>(common < total ? common : total)};
}

}  // namespace flash_mla
