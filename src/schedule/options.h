#pragma once

#include <limits>

#include "flash_mla/schedule.h"

/// The options of a schedule beside its number of parts: X(name, least, most), in the order in which they are
/// checked. Members of ScheduleOptions and of the C ABI's flash_mla_schedule_options have these names. An
/// option joins those two structs and this list; checks, copies between the interfaces, Python's binding and
/// what a GPU is told follow. ScheduleOptions says what it is by default.
#define FLASH_MLA_SCHEDULE_OPTIONS(X)                           \
  X(block_size, 1, std::numeric_limits<int>::max())             \
  X(fixed_overhead_blocks, 0, std::numeric_limits<int>::max())  \
  X(min_blocks_per_request, 0, 1)                               \
  /* The device counts num_parts times as many in 32 bits. */   \
  X(min_blocks_per_part, 1, 1 << 16)                            \
  X(whole_requests_percent, 0, std::numeric_limits<int>::max()) \
  X(fixed_split_blocks, 0, std::numeric_limits<int>::max())

namespace flash_mla {

/// Throws InvalidArgument for an option out of range.
void check_schedule_options(const ScheduleOptions& options);

}  // namespace flash_mla
